"""A model's layers with attention left out, in one CUDA graph: what an engine feels of the products and norms.

A layer is norm, qkv, o, norm, gate_up, SiLU and product, down; every layer has weights of its own, as in a model, so
none is found in the L2 cache. o reads the first values that qkv wrote. With INT8 tokens our norm hands out rounded
ones, while o and down round theirs, as all products of the others do. The chains of all formats are replayed in turns
(`rowint8.eval.kernels.timing`), each against bf16's. Beside them each product is timed *alone*: its calls on the
weights of all layers, one after the other. In a chain a call follows one of another kind, so it can start less early,
and finds its input where that one left it; the difference is what a benchmark of calls does not show.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from rowint8.eval.kernels import peers as kernel_peers
from rowint8.eval.kernels import plain
from rowint8.eval.kernels.int8_bench import ours, rotated
from rowint8.eval.kernels.peers import Product
from rowint8.eval.kernels.rows import Budget, check_agrees
from rowint8.eval.kernels.timing import Call, Replay, capture, in_turns, paired_ratio, summary
from rowint8.eval.models import DEFAULT_MODEL, MODELS, layer_weights
from rowint8.eval.results.gpu_clock import sm_mhz
from rowint8.eval.results.schema import CHAIN_PRODUCTS, ChainRow
from rowint8.kernels import ops
from rowint8.kernels.activations import rotation_block
from rowint8.kernels.quantize import INT8_MAX, Int8Weight, dequantize
from rowint8.kernels.warmup import WeightShape, warmup

_AGREE = 0.15
"""A layer with operands rounded to FP8 differs from bf16's by less, a wrong one by 1 or so."""
_ALONE_REPLAYS = 5
_CHECKED_TOKENS = 16

Norm = Callable[[Tensor, Tensor], tuple[Any, Tensor]]
"""(x, residual), both [M, H], to (normed, total); it may write over both. normed is what qkv and gate_up take: [M, H],
or INT8 tokens and their scales."""


class Layer(NamedTuple):
    """The products of a layer; gate_up may hold the activation."""

    qkv: Callable[[Any], Tensor]
    o: Product
    gate_up: Callable[[Any], Tensor]
    down: Product


class Chain(NamedTuple):
    """Layers in one format."""

    kernels: str
    layers: Sequence[Layer]
    norm: Norm
    activate: Callable[[Tensor], Tensor] | None
    """[M, 2I] -> [M, I]; None where gate_up does it."""

    def run(self, x: Tensor, residual: Tensor) -> Tensor:
        """[M, H] -> [M, H]."""
        for layer in self.layers:
            normed, residual = self.norm(x, residual)
            mixed = layer.qkv(normed).view(-1)[: x.numel()].view_as(x)
            normed, residual = self.norm(layer.o(mixed), residual)
            hidden = layer.gate_up(normed)
            x = layer.down(self.activate(hidden) if self.activate else hidden)
        return x


class _Small(NamedTuple):
    """What the chains that are not ours share."""

    kernels: str
    norm: Norm
    activate: Callable[[Tensor], Tensor]


class ChainBench:
    """Times the chains of a model's layers, in bf16.

    Args:
        announce: is told which chain is left out and why.
        layers: how many.
        model: one of `MODELS`.
        device, capture: for tests.
    """

    def __init__(
        self,
        announce: Callable[[str], None],
        layers: int,
        model: str = DEFAULT_MODEL,
        device: str = "cuda",
        capture: Callable[[Sequence[Call]], Replay] = capture,
    ) -> None:
        self._announce, self._layers, self._model = announce, layers, model
        self._device, self._capture = device, capture
        self._sizes = layer_weights(MODELS[model])
        self._hidden = MODELS[model]["hidden_size"]
        self._norm_weight = torch.ones(self._hidden, device=device, dtype=torch.bfloat16)
        self._our_norms = {"rowint8": self._our_norm, "rowint8-a8": self._our_int8_norm}
        self._budget = Budget(dict.fromkeys([*_MAKERS, "vllm"], math.inf), announce)

    def rows(self, tokens: Sequence[int]) -> Iterator[ChainRow]:
        """A row for every number of tokens and chain, as soon as it is measured."""
        self._compile_ours(max(tokens))
        chains = self._chains()
        for m in tokens:
            before = sm_mhz()
            x, residual = self._random(m, self._hidden), self._random(m, self._hidden)
            # A norm in place leaves its results in the copies: each replay begins with other values, all finite.
            calls = {name: partial(chain.run, x.clone(), residual.clone()) for name, chain in chains.items()}
            times = in_turns({name: self._capture([call]) for name, call in calls.items()})
            clocks = before, sm_mhz()
            for name, chain in chains.items():
                us, spread = summary(times[name])
                yield ChainRow(
                    chain=name,
                    kernels=chain.kernels,
                    model=self._model,
                    layers=self._layers,
                    M=m,
                    us=us,
                    spread=spread,
                    ratio=None if name == "bf16" else paired_ratio(times[name], times["bf16"]),
                    alone_us=self._alone_us(chain, m),
                    sm_mhz=(clocks[0], clocks[1]) if clocks[0] and clocks[1] else None,
                )

    def _compile_ours(self, most: int) -> None:
        weights = [
            WeightShape("swiglu" if name == "gate_up" else "linear", *size) for name, size in self._sizes.items()
        ]
        weights.append(WeightShape("add_rms_norm", self._hidden, self._hidden))
        ready = warmup(weights, torch.bfloat16, torch.device(self._device), most)
        if ready.kernels:
            self._announce(f"rowint8: made {ready.kernels} kernels ready in {ready.seconds:.1f} s")

    def _chains(self) -> dict[str, Chain]:
        """Those that can be made here and compute what bf16's first layer does."""
        weights = [{name: self._weight(*size) for name, size in self._sizes.items()} for _ in range(self._layers)]
        small = self._small_kernels()
        chains = {"bf16": self._made("bf16", weights, small)}
        for name in list(_MAKERS)[1:]:
            if chain := self._budget.run(name, partial(self._made, name, weights, small, chains["bf16"])):
                chains[name] = chain
        return chains

    def _made(
        self, name: str, weights: Sequence[dict[str, Int8Weight]], small: "_Small", reference: Chain | None = None
    ) -> Chain:
        """The chain.

        Raises:
            ValueError: it computes something else than the reference.
        """
        kernels, make = _MAKERS[name]
        layers = [Layer(**{part: make(part, weight) for part, weight in each.items()}) for each in weights]
        if name in self._our_norms:
            chain = Chain(kernels, layers, self._our_norms[name], None)
        else:
            chain = Chain(f"{kernels}; {small.kernels}", layers, small.norm, small.activate)
        if reference:
            given = self._random(_CHECKED_TOKENS, self._hidden), self._random(_CHECKED_TOKENS, self._hidden)
            first = [each._replace(layers=each.layers[:1]) for each in (chain, reference)]
            check_agrees(*(each.run(*(x.clone() for x in given)) for each in first), within=_AGREE)
        return chain

    def _small_kernels(self) -> "_Small":
        if self._budget.run("vllm", kernel_peers.load_vllm):
            norm = partial(kernel_peers.add_rms_norm, weight=self._norm_weight, eps=plain.EPS)
            return _Small("vLLM's fused_add_rms_norm and silu_and_mul", norm, kernel_peers.silu_and_mul)
        torch._dynamo.reset()
        example = self._random(2, self._sizes["gate_up"][0])
        torch._dynamo.mark_dynamic(example, 0)
        compiled = torch.compile(plain.silu_and_mul)
        compiled(example)
        return _Small("rowint8's add_rms_norm, torch.compile's SiLU and product", self._our_norm, compiled)

    def _our_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, residual, self._norm_weight, plain.EPS)

    def _our_int8_norm(self, x: Tensor, residual: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        block = rotation_block(self._hidden)
        tokens, scale, total = ops.add_rms_norm_int8(x, residual, self._norm_weight, plain.EPS, block)
        return (tokens, scale), total

    def _alone_us(self, chain: Chain, m: int) -> dict[str, float]:
        """Name to microseconds a call; see `ChainRow.alone_us`."""
        x, wide = self._random(m, self._hidden), self._random(m, self._sizes["down"][1])
        normed, _ = chain.norm(x.clone(), x.clone())
        given = {"qkv": normed, "o": x, "gate_up": normed, "down": wide}
        parts: dict[str, list[Call]] = {
            name: [partial(getattr(layer, name), given[name]) for layer in chain.layers] for name in CHAIN_PRODUCTS
        }
        parts["norm"] = [partial(chain.norm, x.clone(), x.clone())] * self._layers
        if chain.activate:
            parts["activation"] = [partial(chain.activate, self._random(m, self._sizes["gate_up"][0]))] * self._layers
        return {name: self._one_alone(calls) for name, calls in parts.items()}

    def _one_alone(self, calls: Sequence[Call]) -> float:
        replay = self._capture(calls)
        replay()
        return summary([replay() for _ in range(_ALONE_REPLAYS)])[0]

    def _weight(self, n: int, k: int) -> Int8Weight:
        """Uniform values of standard deviation 1 / sqrt(k), so that a product of normed tokens has about 1."""
        values = torch.randint(-INT8_MAX, INT8_MAX + 1, (n, k), device=self._device, dtype=torch.int8)
        scale = 3**0.5 / INT8_MAX * k**-0.5
        return Int8Weight(values, torch.full((n,), scale, device=self._device, dtype=torch.float16))

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self._device, dtype=torch.bfloat16)


def _dense(part: str, weight: Int8Weight) -> Product:
    dense = dequantize(weight, torch.bfloat16)
    return lambda x: dense_linear(x, dense)


def _ours(part: str, weight: Int8Weight) -> Product:
    operator = ops.swiglu if part == "gate_up" else ops.linear
    return lambda x: operator(x, *weight)


def _ours_int8(part: str, weight: Int8Weight) -> Callable[[Any], Tensor]:
    rows = rotated(dequantize(weight))
    product = ours("swiglu_int8" if part == "gate_up" else "linear_int8", rows, torch.bfloat16)
    return product if part in ("o", "down") else lambda tokens: product.multiply(*tokens)


def _peer(name: str) -> Callable[[str, Int8Weight], Product]:
    def make(part: str, weight: Int8Weight) -> Product:
        maker: Any = getattr(kernel_peers, name)
        return maker(weight, torch.bfloat16)

    return make


_MAKERS: dict[str, tuple[str, Callable[[str, Int8Weight], Callable[[Any], Tensor]]]] = {
    "bf16": ("cuBLAS", _dense),
    "rowint8": ("rowint8's linear, swiglu and add_rms_norm", _ours),
    "rowint8-a8": ("rowint8's add_rms_norm_int8, linear_int8, swiglu_int8 and quantize_tokens", _ours_int8),
    "fp8": ("vLLM's CUTLASS FP8, a scale a row and a token", _peer("cutlass_fp8")),
    "int8": ("vLLM's CUTLASS INT8 of both operands, a scale a row and a token", _peer("cutlass_int8")),
    "machete": ("vLLM's Machete W8A16", _peer("machete")),
}
"""Chain to its products' name, and what makes a product (by its name) of a weight; bf16, which all are compared with,
comes first."""
