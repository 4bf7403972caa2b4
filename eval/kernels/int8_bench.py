"""Times of INT8 products of INT8 tokens on a CUDA GPU, beside vLLM's CUTLASS products, cuBLAS and the weight-only form.

Every number of tokens has two rows: `linear_int8` on tokens that are rounded already, as a norm hands them out, and
`quantize_tokens+linear_int8` with the rounding, two kernels of ours and two of vLLM's. So it is for `swiglu_int8`,
where the others' product is followed by vLLM's `silu_and_mul`, without vLLM by torch's.

What an entry of a row's `us` is:

    rowint8                    this project's operator, on rows and tokens that a Hadamard matrix has rotated
    cutlass_int8, cutlass_fp8  vLLM's `cutlass_scaled_mm`, a scale a row and a token
    rowint8_weight_only        `linear` or `swiglu` of the same INT8 rows, with 16-bit tokens, in both rows
    cublas_bf16 (cublas_fp16)  the dense weight in the activations' dtype, in both rows
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels import plain
from rowint8.eval.kernels.peers import RoundedProduct
from rowint8.eval.kernels.rows import CUBLAS, Candidates, RowBench, check_agrees
from rowint8.eval.kernels.shapes import INT8_FORMS, Shape
from rowint8.eval.kernels.timing import Call, Replay, capture, rotated_copies
from rowint8.eval.results.schema import KernelRow
from rowint8.kernels import ops
from rowint8.kernels.activations import rotate, rotation_block
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise

_READY_S = {"vllm": 40.0, "cutlass_int8": 60.0, "cutlass_fp8": 60.0}
_AGREE = 0.1
"""Both operands rounded to FP8 differ from bf16 by about 0.04, a wrong product by 1 or so."""
_CHECKED_TOKENS = 16


def rotated(weight: Tensor) -> Int8Weight:
    """A dense [N, K] weight as INT8 rows for rotated tokens."""
    return quantize_rowwise(rotate(weight.float(), rotation_block(weight.shape[1])))


def ours(op: str, weight: Int8Weight, dtype: torch.dtype) -> RoundedProduct:
    """`linear_int8` or `swiglu_int8` of rotated rows."""
    block = rotation_block(weight.values.shape[1])
    extra = (None,) if op == "linear_int8" else ()  # no bias
    operator = getattr(ops, op)
    return RoundedProduct(
        lambda x: ops.quantize_tokens(x, block), lambda tokens, scale: operator(tokens, scale, *weight, *extra, dtype)
    )


class Int8Bench(RowBench):
    """Times the products of INT8 tokens over shapes and numbers of tokens.

    Args:
        dtype, announce, device, capture: see `RowBench`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        announce: Callable[[str], None],
        device: str = "cuda",
        capture: Callable[[Sequence[Call]], Replay] = capture,
    ) -> None:
        super().__init__(dtype, announce, _READY_S, device, capture)
        self._activate: Callable[[Tensor], Tensor] = plain.silu_and_mul

    def rows(self, shapes: Sequence[Shape], tokens: Sequence[int]) -> Iterator[KernelRow]:
        """Two rows for every operator of every shape and number of tokens, as soon as they are measured.

        Args:
            shapes: their operators are the weight-only ones, which stand for the INT8 forms.
        """
        if shapes and self._budget.run("vllm", kernel_peers.load_vllm):
            self._activate = kernel_peers.silu_and_mul
        for shape in shapes:
            copies = range(rotated_copies(shape.n, shape.k))
            dense = [self._random(shape.n, shape.k) * shape.k**-0.5 for _ in copies]
            int8 = [rotated(weight) for weight in dense]
            for op in shape.ops:
                products = self._products(op, dense, int8)
                for m in tokens:
                    yield from self._two_rows(op, shape, m, products, dense, int8)

    def _products(
        self, op: str, dense: Sequence[Tensor], int8: Sequence[Int8Weight]
    ) -> dict[str, list[RoundedProduct]]:
        """Ours, and those of others that can be made here and compute the same."""
        x = self._random(_CHECKED_TOKENS, dense[0].shape[1])
        reference = self._dense(op, dense[0])(x)
        products = {"rowint8": [ours(INT8_FORMS[op], weight, self._dtype) for weight in int8]}
        check_agrees(products["rowint8"][0](x), reference, _AGREE)
        for name, make in (("cutlass_int8", kernel_peers.cutlass_int8), ("cutlass_fp8", kernel_peers.cutlass_fp8)):
            made = self._budget.run(name, partial(self._made, make, op, dense, x, reference))
            products |= {name: made} if made else {}
        return products

    def _made(
        self,
        make: Callable[[Int8Weight, torch.dtype], RoundedProduct],
        op: str,
        dense: Sequence[Tensor],
        x: Tensor,
        reference: Tensor,
    ) -> list[RoundedProduct]:
        products = [make(quantize_rowwise(weight), self._dtype) for weight in dense]
        if op == "swiglu":
            products = [each._replace(multiply=partial(self._activated, each.multiply)) for each in products]
        check_agrees(self._finished(products[0](x)), reference, _AGREE)
        return products

    def _two_rows(
        self,
        op: str,
        shape: Shape,
        m: int,
        products: dict[str, list[RoundedProduct]],
        dense: Sequence[Tensor],
        int8: Sequence[Int8Weight],
    ) -> Iterator[KernelRow]:
        x = self._random(m, shape.k)
        weight_only = ops.linear if op == "linear" else ops.swiglu
        others: Candidates = {
            "rowint8_weight_only": [partial(weight_only, x, *weight) for weight in int8],
            CUBLAS[self._dtype]: [partial(self._dense(op, weight), x) for weight in dense],
        }
        apart, whole = {}, {}
        for name, each in products.items():
            tokens = each[0].round(x)
            apart[name] = [partial(product.multiply, *tokens) for product in each]
            whole[name] = [partial(product, x) for product in each]
        yield self._row(INT8_FORMS[op], shape, m, apart | others)
        yield self._row(f"quantize_tokens+{INT8_FORMS[op]}", shape, m, whole | others)

    def _dense(self, op: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
        product: Callable[[Tensor], Tensor] = lambda x: dense_linear(x, weight)  # noqa: E731
        return partial(self._activated, product) if op == "swiglu" else product

    def _activated(self, product: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return self._activate(product(*given))
