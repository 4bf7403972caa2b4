"""The sum into the residual stream and the norm behind it as one kernel: an Inductor pass.

    total = x + residual                                              [..., H]
    normed = total / sqrt(mean(total^2) + eps) * weight               [..., H]

becomes `rowint8::add_rms_norm(x, residual, weight, eps)`. What torch.compile makes of the two starts only when the
kernel ahead of it has ended; this one is set up before. Versions of vLLM that have an IR write the two as one operator,
which the pass replaces; others write them in torch, which it matches. Either way vLLM's own fusions come first, and
what they take is theirs. The sum is rounded before it is normalized, as by vLLM's CUDA kernel, not by its native code.

Where nothing but `rowint8::quantize_tokens` reads what is normed, the two become `rowint8::add_rms_norm_int8`. LoRA
reads it too, so there they stay.
"""

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode

from rowint8.kernels import checks, ops
from rowint8.vllm_plugin import compat


class NormFusion(InductorPass):
    """The pass, for activations of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, graph: fx.Graph) -> None:
        _patterns(self.dtype).apply(graph)
        of_vllm = compat.norm_operator()
        for node in graph.find_nodes(op="call_function", target=of_vllm) if of_vllm else ():
            if supports(*node.args):
                _replace(node)
        for node in graph.find_nodes(op="call_function", target=torch.ops.rowint8.add_rms_norm.default):
            _round(node)

    def uuid(self) -> str:
        return self.hash_source(type(self), supports, _replace, _round, total_by_torch, norm_by_torch, str(self.dtype))


def supports(x: Any, residual: Any, weight: Any, eps: float, variance_size: int | None = None) -> bool:
    """Whether `rowint8::add_rms_norm` computes vLLM's operator for these arguments, nodes of a graph."""
    if variance_size is not None or not hasattr(weight, "meta"):
        return False
    x, residual, weight = (node.meta["val"] for node in (x, residual, weight))
    alike = x.dtype == residual.dtype == weight.dtype and x.shape == residual.shape
    return alike and x.dtype in checks.ACTIVATION_DTYPES and weight.shape == x.shape[-1:]


def _replace(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        ours = node.graph.call_function(torch.ops.rowint8.add_rms_norm.default, node.args[:4])
    ours.meta = node.meta.copy()
    node.replace_all_uses_with(ours)
    node.graph.erase_node(node)


def _round(norm: fx.Node) -> None:
    """Lets the norm hand out INT8 where every reader rounds it."""
    graph, outputs = norm.graph, {node.args[1]: node for node in norm.users}
    rounded = list(outputs[0].users) if 0 in outputs else []
    once = len(outputs) == len(norm.users) and len(rounded) == 1
    if not once or rounded[0].target != torch.ops.rowint8.quantize_tokens.default:
        return
    (quantize,) = rounded
    with graph.inserting_before(norm):
        ours = graph.call_function(torch.ops.rowint8.add_rms_norm_int8.default, (*norm.args, quantize.args[1]))
    ours.meta = {"val": (*quantize.meta["val"], norm.meta["val"][1])}
    for node in [*quantize.users, *([outputs[1]] if 1 in outputs else [])]:
        place = node.args[1] if node.args[0] is quantize else 2
        with graph.inserting_after(ours):
            output = graph.call_function(operator.getitem, (ours, place))
        output.meta = node.meta.copy()
        node.replace_all_uses_with(output)
        graph.erase_node(node)
    for node in (quantize, outputs[0], norm):
        graph.erase_node(node)


def total_by_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum and norm as vLLM's native code has them."""
    total = x.float() + residual.float()
    unit = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight, total.to(x.dtype)


def norm_by_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The last one of a model, whose sum nobody reads."""
    return total_by_torch(x, residual, weight, eps)[0]


@cache
@enable_fake_mode
def _patterns(dtype: torch.dtype) -> PatternMatcherPass:
    """Both patterns for activations of `dtype`; they match every size and every eps."""
    patterns: Any = PatternMatcherPass("rowint8_norm")
    inputs = [torch.empty(3, 8, dtype=dtype), torch.empty(3, 8, dtype=dtype), torch.empty(8, dtype=dtype)]

    def without_total(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ops.add_rms_norm(x, residual, weight, eps)[0]

    for search, replacement in ((total_by_torch, ops.add_rms_norm), (norm_by_torch, without_total)):
        register_replacement(
            search,
            replacement,
            inputs,
            fwd_only,
            patterns,
            scalar_workaround={"eps": 0.12345},
            extra_check=_same_shapes,
        )
    return patterns


def _same_shapes(match: Any) -> bool:
    """Whether x and residual have one shape and dtype, which torch's sum does not ask for."""
    return supports(*(match.kwargs[name] for name in ("x", "residual", "weight", "eps")))
