"""Times of a mixture of experts on a CUDA GPU: `ops.experts` beside vLLM's Triton kernels and torch's grouped product.

A row is a model's layer on M tokens, routed in one of two ways: "uniform", every set of experts is as likely as any
other; "zipf", the expert of rank r is wanted in proportion to 1 / r, as far as a token's experts are distinct. A call's
experts are drawn anew, so that none is found in the L2 cache; `used` is how many a call reads in the mean.

What an entry of a row's `us` is:

    rowint8                      this project's operator, sorting and weighted sum included
    vllm_int8                    vLLM's `fused_experts` over the same INT8 weights
    vllm_bf16, vllm_fp8          the same over weights in bf16, and in FP8 by rows with tokens rounded to FP8
    grouped_bf16                 torch's grouped products and activation alone, of tokens that are sorted already
    rowint8_dense                `ops.swiglu` and `ops.linear` over one expert with as many pairs, from 1024 tokens on
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rowint8.eval.kernels import plain
from rowint8.eval.kernels.rows import Candidates, RowBench
from rowint8.eval.kernels.shapes import ExpertsShape, Shape
from rowint8.eval.kernels.timing import Call, Replay, capture
from rowint8.eval.results.schema import KernelRow
from rowint8.kernels import ops

ROUTINGS = ("uniform", "zipf")
_READY_S: dict[str, float] = {"vllm_int8": 60, "vllm_bf16": 60, "vllm_fp8": 60, "grouped_bf16": 30}
_DENSE_FROM = 1024
_FEW_TOKENS = 256
_SCALE = 1 / 3000
"""Scale of random INT8 rows, which keeps the size of activations about as it is."""


class Weights(NamedTuple):
    """A layer's weights: INT8 [E, N, K] and fp16 [E, N]."""

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor


class Routed(NamedTuple):
    """Tokens and where they go."""

    x: Tensor
    weights: Tensor
    """fp32 [M, k], a token's add up to 1."""
    ids: Tensor
    """int32 [M, k]."""


def random_weights(shape: ExpertsShape, device: str) -> Weights:
    """INT8 weights of a model's layer."""

    def stacked(n: int, k: int) -> tuple[Tensor, Tensor]:
        values = torch.randint(-127, 128, (shape.experts, n, k), dtype=torch.int8, device=device)
        return values, torch.full((shape.experts, n), _SCALE * (2048 / k) ** 0.5, dtype=torch.float16, device=device)

    return Weights(*stacked(2 * shape.intermediate, shape.hidden), *stacked(shape.hidden, shape.intermediate))


def random_routing(shape: ExpertsShape, m: int, routing: str, dtype: torch.dtype, device: str) -> Routed:
    """m random tokens with distinct experts each, drawn by adding Gumbel noise to the logarithms of probabilities."""
    rank = torch.arange(1, shape.experts + 1, device=device)[torch.randperm(shape.experts, device=device)]
    wanted = -rank.float().log() if routing == "zipf" else torch.zeros(shape.experts, device=device)
    noise = -torch.empty(m, shape.experts, device=device).exponential_().log()
    ids = (wanted + noise).topk(shape.topk, dim=1).indices.to(torch.int32).contiguous()
    x = torch.randn(m, shape.hidden, device=device, dtype=dtype)
    return Routed(x, torch.rand(ids.shape, device=device).softmax(1), ids)


def random_calls(shape: ExpertsShape, m: int, routing: str, dtype: torch.dtype, device: str) -> list[Routed]:
    """What the calls of a row take in turns."""
    return [random_routing(shape, m, routing, dtype, device) for _ in range(16 if m <= _FEW_TOKENS else 3)]


class ExpertsBench(RowBench):
    """Times layers of experts over models, numbers of tokens and routings.

    Args:
        dtype, announce, device, capture: see `RowBench`.
        peers: whether others are timed too, where they are installed.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        announce: Callable[[str], None],
        peers: bool = True,
        device: str = "cuda",
        capture: Callable[[Sequence[Call]], Replay] = capture,
    ) -> None:
        super().__init__(dtype, announce, _READY_S, device, capture)
        self._peers = peers

    def rows(self, shapes: Sequence[ExpertsShape], tokens: Sequence[int]) -> Iterator[KernelRow]:
        """A row for every model, number of tokens and routing, as soon as it is measured."""
        for shape in shapes:
            weights = random_weights(shape, self._device)
            others = self._others(weights) if self._peers else {}
            for m in tokens:
                for routing in ROUTINGS:
                    calls = random_calls(shape, m, routing, self._dtype, self._device)
                    used = sum(len(call.ids.unique()) for call in calls) / len(calls)
                    sizes = Shape(f"{shape.name}/{routing}", 2 * shape.intermediate, shape.hidden)
                    row = self._row("experts", sizes, m, self._candidates(weights, others, calls))
                    yield replace(row, experts_used=used, topk=shape.topk)

    def _others(self, weights: Weights) -> dict[str, Callable[[Routed], Any]]:
        makers = dict(
            vllm_int8=vllm_int8,
            vllm_bf16=partial(vllm_dense, self._dtype),
            vllm_fp8=vllm_fp8,
            grouped_bf16=partial(grouped, self._dtype),
        )
        made = {name: self._budget.run(name, partial(make, weights)) for name, make in makers.items()}
        return {name: call for name, call in made.items() if call}

    def _candidates(
        self, weights: Weights, others: Mapping[str, Callable[[Routed], Any]], calls: Sequence[Routed]
    ) -> Candidates:
        candidates: Candidates = {"rowint8": [partial(ops.experts, call.x, *weights, *call[1:]) for call in calls]}
        reference = ops.experts(calls[0].x, *weights, *calls[0][1:])
        for name, product in others.items():
            theirs = [partial(product, call) for call in calls]
            if name == "grouped_bf16":  # it leaves out the sum
                candidates |= {name: [product(call) for call in calls]}
            elif self._is_ready(name, theirs, reference):
                candidates |= {name: theirs}
        if len(calls[0].x) >= _DENSE_FROM:
            candidates["rowint8_dense"] = [
                partial(_dense, weights, call.x.repeat(call.ids.shape[1], 1)) for call in calls
            ]
        return candidates


def _dense(weights: Weights, x: Tensor) -> Tensor:
    """As many products on one expert."""
    hidden = ops.swiglu(x, weights.gate_up[0], weights.gate_up_scale[0])
    return ops.linear(hidden, weights.down[0], weights.down_scale[0])


def grouped(dtype: torch.dtype, weights: Weights) -> Callable[[Routed], Call]:
    """torch's grouped products of dense weights; sorts at once, and returns the call that is timed."""
    gate_up, down = (_widened(*pair, dtype).mT for pair in (weights[:2], weights[2:]))

    def product(call: Routed) -> Call:
        experts = call.ids.flatten()
        x = call.x[experts.argsort(stable=True) // call.ids.shape[1]]
        ends = torch.bincount(experts, minlength=len(gate_up)).cumsum(0).to(torch.int32)
        multiply: Any = torch._grouped_mm  # type: ignore[reportPrivateImportUsage]
        return lambda: multiply(plain.silu_and_mul(multiply(x, gate_up, offs=ends)), down, offs=ends)

    product(Routed(torch.zeros(1, gate_up.shape[1], dtype=dtype, device=gate_up.device), *_one_pair(gate_up)))()
    return product


def _one_pair(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(1, 1, device=like.device), torch.zeros(1, 1, dtype=torch.int32, device=like.device)


def vllm_int8(weights: Weights) -> Callable[[Routed], Tensor]:
    """vLLM's Triton kernel over the same weights."""
    from vllm.model_executor.layers.fused_moe.config import int8_w8a16_moe_quant_config

    config = int8_w8a16_moe_quant_config(w1_scale=weights.gate_up_scale, w2_scale=weights.down_scale)
    return _vllm(weights.gate_up, weights.down, config)


def vllm_dense(dtype: torch.dtype, weights: Weights) -> Callable[[Routed], Tensor]:
    """The same over weights in the activations' dtype."""
    return _vllm(_widened(*weights[:2], dtype), _widened(*weights[2:], dtype), None)


def vllm_fp8(weights: Weights) -> Callable[[Routed], Tensor]:
    """The same over FP8 rows, with a scale a row and one a token."""
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    kind = torch.float8_e4m3fn
    step = 127 / torch.finfo(kind).max
    gate_up, down = (
        torch.stack([(part.float() / step).to(kind) for part in stack]) for stack in (weights[0], weights[2])
    )
    scales = [(scale.float() * step)[..., None] for scale in (weights[1], weights[3])]
    config = fp8_w8a8_moe_quant_config(
        w1_scale=scales[0], w2_scale=scales[1], per_act_token_quant=True, per_out_ch_quant=True
    )
    return _vllm(gate_up, down, config)


def _vllm(gate_up: Tensor, down: Tensor, config: Any) -> Callable[[Routed], Tensor]:
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda call: fused_experts(call.x, gate_up, down, call.weights, call.ids, quant_config=config)


def _widened(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N, K] expert by expert, as the fp32 copy of all would be large."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    for expert, (rows, scales) in enumerate(zip(values, scale, strict=True)):
        out[expert] = rows.float() * scales.float()[:, None]
    return out
