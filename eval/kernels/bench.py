"""Kernel times on a CUDA GPU: the operators of this project beside cuBLAS, other INT8 kernels and torch.compile.

The calls of a product rotate over copies of the weight that together exceed the L2 cache several times, as the layers
of a model do. `add_rms_norm` finds the same activations in L2 on every call, as between the layers of a model, where
they are few enough. `rowint8.eval.kernels.timing` says how the candidates of a row are timed beside one another.

`host_us` is the host's time for a call of ours or of cuBLAS, which only queues work: what a step costs at least where
no CUDA graph replays it, as with long prompts.

What an entry of a row's `us` is:

    rowint8, cublas_bf16 (cublas_fp16)  this project's operator; the dense weight in the activations' dtype
    marlin, machete, gemlite, humming   other W8A16 kernels, in `linear` rows; the last two where `is_timed` says
    unfused, cublas_...                 in `swiglu` rows: the product, then torch's SiLU and product, two kernels
    ..._vllm                            in `swiglu` rows: a product, then vLLM's `silu_and_mul`; unfused_vllm is ours
    eager, compiled...                  the operator in plain torch (`plain`), as it is or by torch.compile
    vllm                                in `add_rms_norm` rows: vLLM's `fused_add_rms_norm`
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels import plain
from rowint8.eval.kernels.peers import Product
from rowint8.eval.kernels.plain import MODES, compile_logged
from rowint8.eval.kernels.rows import CUBLAS, Candidates, RowBench, check_agrees
from rowint8.eval.kernels.shapes import FEW_COUNTS, SHAPES, Shape
from rowint8.eval.kernels.timing import Call, Replay, capture, rotated_copies
from rowint8.eval.models import DEFAULT_MODEL
from rowint8.eval.results.schema import Compilation, KernelRow
from rowint8.kernels import ops
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.warmup import WeightShape, warmup

READY_S: dict[str, float] = {
    "marlin": 60,
    "machete": 30,
    "gemlite": 110,
    "humming": 400,
    "vllm": 40,
    "compiled": 60,
    "compiled_max_autotune": 100,
}
"""Seconds each may spend in a run on packing weights, compiling and tuning; see `Budget`."""

_NORM_CALLS = 20
_SLOW_PEERS = ("gemlite", "humming")


def is_timed(peer: str, shape: Shape, m: int) -> bool:
    """Whether a peer is timed there: those that compile and tune for minutes only on one model and at few counts."""
    few = m in FEW_COUNTS and shape.name in {each.name for each in SHAPES[DEFAULT_MODEL]}
    return few or peer not in _SLOW_PEERS


class KernelBench(RowBench):
    """Times the weight-only operators over shapes and numbers of tokens.

    Args:
        dtype, announce, ready_s, device, capture: see `RowBench`.
        peers: names in `kernel_peers.PEERS`; with any, also vLLM's small kernels.
        compiled: names in `plain.MODES` that the products are compiled by; with any, also eager mode.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        announce: Callable[[str], None],
        peers: Sequence[str] = (),
        compiled: Sequence[str] = (),
        ready_s: Mapping[str, float] = READY_S,
        device: str = "cuda",
        capture: Callable[[Sequence[Call]], Replay] = capture,
    ) -> None:
        super().__init__(dtype, announce, ready_s, device, capture)
        self._peers, self._compiled = peers, compiled
        self._vllm = False

    def rows(self, shapes: Sequence[Shape], tokens: Sequence[int]) -> Iterator[KernelRow]:
        """A row for every operator of every shape and number of tokens, as soon as it is measured."""
        if not shapes:
            return
        self._compile_ours(shapes, max(tokens))
        products = [shape for shape in shapes if "add_rms_norm" not in shape.ops]
        self._vllm = bool(self._peers and self._budget.run("vllm", kernel_peers.load_vllm))
        met = [(shape, m) for shape in products for m in tokens if is_timed("gemlite", shape, m)]
        if "gemlite" in self._peers and met:
            sizes, counts = (list(dict.fromkeys(each)) for each in zip(*((s[1:3], m) for s, m in met), strict=True))
            seconds = self._budget.left_s("gemlite") / 2
            self._budget.run("gemlite", partial(kernel_peers.gemlite_ahead, sizes, counts, self._dtype, seconds))
        for shape in shapes:
            yield from (self._product_rows if shape in products else self._norm_rows)(shape, tokens)

    def _compile_ours(self, shapes: Sequence[Shape], most: int) -> None:
        """In parallel, what would else be compiled one after the other, at the first call of each kernel."""
        weights = [WeightShape(op, shape.n, shape.k) for shape in shapes for op in shape.ops]
        ready = warmup(weights, self._dtype, torch.device(self._device), most)
        if ready.kernels:
            self._announce(f"rowint8: made {ready.kernels} kernels ready in {ready.seconds:.1f} s")

    def _product_rows(self, shape: Shape, tokens: Sequence[int]) -> Iterator[KernelRow]:
        dense = [self._random(shape.n, shape.k) * shape.k**-0.5 for _ in range(rotated_copies(shape.n, shape.k))]
        int8 = [quantize_rowwise(weight) for weight in dense]
        named = [name for name in self._peers if any(is_timed(name, shape, m) for m in tokens)]
        made = {name: self._made(name, shape, int8) for name in named}
        for m in tokens:
            x = self._random(m, shape.k)
            reference = ops.linear(x, *int8[0])
            timed = {name: products for name, products in made.items() if is_timed(name, shape, m)}
            calls = {name: [partial(product, x) for product in products] for name, products in timed.items()}
            peers = {name: calls[name] for name in calls if self._is_ready(name, calls[name], reference)}
            weights = [(x, *weight) for weight in int8]
            if "linear" in shape.ops:
                candidates: Candidates = {
                    "rowint8": [partial(ops.linear, *given) for given in weights],
                    CUBLAS[self._dtype]: [partial(dense_linear, x, w) for w in dense],
                }
                by_torch, facts = self._by_torch(plain.linear, weights, reference, self._compiled)
                yield self._row("linear", shape, m, candidates | peers | by_torch, facts)
            if "swiglu" in shape.ops:
                candidates = self._swiglu_candidates(x, dense, int8, peers)
                by_torch, facts = self._by_torch(plain.swiglu, weights, ops.swiglu(*weights[0]), self._compiled)
                yield self._row("swiglu", shape, m, candidates | by_torch, facts)

    def _made(self, name: str, shape: Shape, int8: Sequence) -> list[Product]:
        make = kernel_peers.PEERS[name]
        start = time.perf_counter()
        made = self._budget.run(name, lambda: self._finished([make(w, self._dtype) for w in int8]))
        if made:
            seconds = time.perf_counter() - start
            self._announce(f"{name}: packed {len(made)} copies of {shape.name} in {seconds:.1f} s")
        return made or []

    def _swiglu_candidates(self, x: Tensor, dense: list[Tensor], int8: list, peers: Candidates) -> Candidates:
        unfused = {
            "unfused": [partial(ops.linear, x, *w) for w in int8],
            CUBLAS[self._dtype]: [partial(dense_linear, x, w) for w in dense],
        }
        candidates: Candidates = {"rowint8": [partial(ops.swiglu, x, *w) for w in int8]}
        candidates |= _followed_by(plain.silu_and_mul, unfused)
        if self._vllm:
            by_vllm = _followed_by(kernel_peers.silu_and_mul, unfused | peers)
            candidates |= {f"{name}_vllm": calls for name, calls in by_vllm.items()}
        return candidates

    def _norm_rows(self, shape: Shape, tokens: Sequence[int]) -> Iterator[KernelRow]:
        weight = self._random(shape.n)
        by_torch = self._norms_by_torch(shape, weight)
        for m in tokens:
            x, residual = self._random(m, shape.n), self._random(m, shape.n)
            reference = ops.add_rms_norm(x, residual, weight, plain.EPS)
            calls = {name: partial(call, x, residual, weight) for name, (call, _) in by_torch.items()}
            if self._vllm:  # it works in place
                calls["vllm"] = partial(kernel_peers.add_rms_norm, x.clone(), residual.clone(), weight, plain.EPS)
            others = {name: call for name, call in calls.items() if self._is_ready(name, [call], reference)}
            ours: dict[str, Call] = {"rowint8": partial(ops.add_rms_norm, x, residual, weight, plain.EPS)}
            candidates = {name: [call] * _NORM_CALLS for name, call in (ours | others).items()}
            facts = {name: fact for name, (_, fact) in by_torch.items() if self._compiled and fact and name in others}
            yield self._row("add_rms_norm", shape, m, candidates, facts)

    def _norms_by_torch(self, shape: Shape, weight: Tensor) -> dict[str, tuple[Callable, Compilation | None]]:
        """The norm in plain torch, and compiled once for any number of tokens from 2 on; torch compiles anew for 1."""
        torch._dynamo.reset()
        x, residual = self._random(2, shape.n), self._random(2, shape.n)
        for each in (x, residual):
            torch._dynamo.mark_dynamic(each, 0)
        work = partial(compile_logged, plain.add_rms_norm, (x, residual, weight), MODES["compiled"], dynamic=None)
        made = self._budget.run("compiled", work)
        return {"eager": (plain.add_rms_norm, None)} | ({"compiled": (made[0], made[2])} if made else {})

    def _by_torch(
        self, expression: Callable, arguments: Sequence[tuple], reference: Any, modes: Sequence[str]
    ) -> tuple[Candidates, dict[str, Compilation]]:
        """`expression` in eager mode and compiled, called with each of `arguments`; nothing without modes."""

        def compiled(mode: str) -> tuple[Callable, Compilation | None]:
            function, out, fact = compile_logged(expression, arguments[0], MODES[mode])
            check_agrees(self._finished(out), reference)
            return function, fact

        if not modes:
            return {}, {}
        torch._dynamo.reset()  # every size is compiled anew, and there is a limit on how many one function may have
        functions, facts = {"eager": expression}, {}
        for mode in modes:
            if made := self._budget.run(mode, partial(compiled, mode)):
                functions[mode] = made[0]
                facts |= {mode: made[1]} if made[1] else {}
        return {name: [partial(call, *given) for given in arguments] for name, call in functions.items()}, facts


def _followed_by(activation: Callable[[Tensor], Tensor], products: Candidates) -> Candidates:
    return {name: [partial(_chain, call, activation) for call in calls] for name, calls in products.items()}


def _chain(call: Call, activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(call())
