"""Gate, up, SiLU and product as one kernel: an Inductor pass that vLLM runs after its own passes.

    gate_up = rowint8::linear(x, values, scale)            [..., 2I]
    out = silu(gate_up[..., :I]) * gate_up[..., I:]        [..., I]

becomes `rowint8::swiglu(x, values, scale)`, in which gate and up (on GPUs) stay in fp32 until their product; with INT8
activations `rowint8::linear_int8` becomes `rowint8::swiglu_int8` likewise. vLLM stacks gate rows over up rows in the
merged weight, on every tensor-parallel rank, as the operators want them.

The pass only ever replaces exactly this. Another activation, a bias, LoRA (which adds to `gate_up`), or a second use of
`gate_up` do not match, and stay as they are. Without compilation (`enforce_eager`) no pass runs.

A line of the log says what became of a model's gate_up layers. On GPUs vLLM splits a model at its attention and
compiles pieces that are alike once, so the line speaks for all layers when the first of them is compiled; another one
follows should a later piece differ. A start from vLLM's compile cache compiles nothing and logs nothing.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.logger import init_logger

from rowint8.kernels import ops
from rowint8.vllm_plugin import compat

logger = init_logger(f"vllm.{__name__}")


class SwigluFusion(InductorPass):
    """The pass. vLLM copies it for every model that it compiles, and puts its `uuid` into the compile cache's key.

    Args:
        dtype: of the activations.
        gate_ups: shapes [2I, K] of the model's gate_up layers, for the log.
    """

    def __init__(self, dtype: torch.dtype, gate_ups: list[tuple[int, int]]) -> None:
        self.dtype = dtype
        self.gate_ups = gate_ups
        self.reported: set[str] = set()

    def __call__(self, graph: fx.Graph) -> None:
        fused = _patterns(self.dtype).apply(graph)
        if any(_weight_shape(node) in self.gate_ups for node in graph.nodes):
            self._report("no SwiGLU kernel for gate_up layers that are not followed by SiLU and product alone")
        elif fused:
            layers = len(self.gate_ups)
            self._report(f"gate, up, SiLU and product are one kernel in the model's {layers} gate_up layers")

    def _report(self, text: str) -> None:
        if text not in self.reported:
            logger.info("rowint8: %s", text)
            self.reported.add(text)

    def uuid(self) -> str:
        parts = (type(self), silu_and_mul_by_torch, silu_and_mul_by_vllm, _register_plain, _register_rounded)
        return self.hash_source(*parts, str(self.dtype))


_WEIGHT = {torch.ops.rowint8.linear.default: 1, torch.ops.rowint8.linear_int8.default: 2}
"""Place of the weight among the arguments of a product."""


def _weight_shape(node: fx.Node) -> tuple | None:
    """Shape of the weight of a product that is not fused; None for other nodes."""
    place: Any = _WEIGHT.get(node.target)  # pyright: ignore[reportArgumentType]
    weight: Any = None if place is None else node.args[place]
    return weight and tuple(weight.meta["val"].shape)


def silu_and_mul_by_torch(gate_up: Tensor) -> Tensor:
    """What `SiluAndMul` compiles to by default."""
    half = gate_up.shape[-1] // 2
    return torch.nn.functional.silu(gate_up[..., :half]) * gate_up[..., half:]


def silu_and_mul_by_vllm(gate_up: Tensor, out: Tensor) -> Any:
    """What `SiluAndMul` compiles to with `+silu_and_mul` among the compilation config's `custom_ops`."""
    silu_and_mul: Any = compat.builtin_silu_and_mul()
    names = [argument.name for argument in silu_and_mul._schema.arguments]
    return auto_functionalized(silu_and_mul, **dict(zip(names, (out, gate_up), strict=True)))[1]


@cache
@enable_fake_mode
def _patterns(dtype: torch.dtype) -> PatternMatcherPass:
    """The patterns for activations of `dtype`: both products, both ways to compute SwiGLU. They match every size."""
    patterns: Any = PatternMatcherPass("rowint8_swiglu")
    weight = [torch.empty(12, 8, dtype=torch.int8), torch.empty(12).half()]
    _register_plain([torch.empty(3, 8, dtype=dtype), *weight], torch.empty(3, 6, dtype=dtype), patterns)
    rounded = [torch.empty(3, 8, dtype=torch.int8), torch.empty(3)]
    _register_rounded([*rounded, *weight], torch.empty(3, 6, dtype=dtype), patterns)
    return patterns


def _register_plain(inputs: list[Tensor], out: Tensor, patterns: Any) -> None:
    def by_torch(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return silu_and_mul_by_torch(ops.linear(x, values, scale))

    def by_vllm(x: Tensor, values: Tensor, scale: Tensor, out: Tensor) -> Any:
        return silu_and_mul_by_vllm(ops.linear(x, values, scale), out)

    def fused(x: Tensor, values: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return ops.swiglu(x, values, scale)

    register_replacement(by_torch, ops.swiglu, inputs, fwd_only, patterns)
    if compat.builtin_silu_and_mul():
        register_replacement(by_vllm, fused, [*inputs, out], fwd_only, patterns)


def _register_rounded(inputs: list[Tensor], out: Tensor, patterns: Any) -> None:
    dtype = out.dtype

    def by_torch(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return silu_and_mul_by_torch(ops.linear_int8(x, x_scale, values, scale, None, dtype))

    def by_vllm(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, out: Tensor) -> Any:
        return silu_and_mul_by_vllm(ops.linear_int8(x, x_scale, values, scale, None, dtype), out)

    def fused(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return ops.swiglu_int8(x, x_scale, values, scale, dtype)

    def fused_alone(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return ops.swiglu_int8(x, x_scale, values, scale, dtype)

    register_replacement(by_torch, fused_alone, inputs, fwd_only, patterns)
    if compat.builtin_silu_and_mul():
        register_replacement(by_vllm, fused, [*inputs, out], fwd_only, patterns)
