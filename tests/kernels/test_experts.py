"""Mixtures of experts against the fp64 oracle: interpreted where there is no GPU, compiled where there is one, and the
CPU's own way. Outputs are poisoned with NaN, shapes are awkward, routing is skewed, inputs are fresh at every run."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rowint8.kernels import ops, reference
from rowint8.kernels.experts import cpu
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.experts.routing import most_blocks, route
from rowint8.kernels.experts.tiles import ExpertsTile, pick_tile
from rowint8.kernels.quantize import Int8Weight, quantize_rowwise
from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.types import TritonTile
from tests.kernels.test_triton_matmul import HALF_ULP, compiled, interpreted

pytestmark = pytest.mark.usefixtures("poison_empty")
on_each_device = pytest.mark.parametrize("device", [interpreted, compiled])

PAIRS = ExpertsTile(TritonTile(1, 32, 64, 2, 1), TritonTile(1, 16, 64, 2, 1))
SORTED = ExpertsTile(TritonTile(16, 32, 64, 4, 2, group=2), TritonTile(16, 16, 32, 4, 2, group=2))
SLICED = ExpertsTile(TritonTile(16, 16, 64, 2, 2, slices=2), TritonTile(16, 16, 64, 2, 2, slices=2))
NARROW = ExpertsTile(TritonTile(64, 32, 64, 4, 2), TritonTile(64, 32, 32, 4, 2), narrow=16)
TILES = {"pairs": PAIRS, "sorted": SORTED, "sliced": SLICED, "narrow": NARROW}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Layer(NamedTuple):
    """What `reference.experts` takes behind the tokens."""

    gate_up: Int8Weight
    down: Int8Weight
    weights: Tensor
    ids: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    expert_map: Tensor | None = None
    activation: str = "silu"
    alpha: float = 1.702
    limit: float | None = None

    def flat(self) -> tuple[Any, ...]:
        """What the kernels take."""
        return *self.gate_up, *self.down, *self[2:]


def stacked(experts: int, n: int, k: int, device: str) -> Int8Weight:
    weight = quantize_rowwise(torch.randn(experts * n, k, device=device) / k**0.5)
    return Int8Weight(weight.values.view(experts, n, k), weight.scale.view(experts, n))


def distinct_ids(m: int, topk: int, experts: int, device: str) -> Tensor:
    return torch.rand(m, experts, device=device).argsort(1)[:, :topk].to(torch.int32).contiguous()


def case(m, topk, experts, h, i, dtype, device, **more) -> tuple[Tensor, Layer]:
    x = torch.randn(m, h, device=device).to(dtype)
    ids = more.pop("ids", None)
    ids = distinct_ids(m, topk, experts, device) if ids is None else ids.to(device)
    weights = torch.rand(ids.shape, device=device)
    return x, Layer(stacked(experts, 2 * i, h, device), stacked(experts, h, i, device), weights, ids, **more)


def absolute(x: Tensor, layer: Layer) -> tuple[Tensor, Layer, Layer]:
    """Inputs without signs, and the same for experts whose hidden values are given."""
    positive = [None if each is None else each.abs() for each in (layer.gate_up_bias, layer.down_bias)]
    weights = [Int8Weight(each.values.abs(), each.scale) for each in (layer.gate_up, layer.down)]
    return x.abs(), layer._replace(gate_up=weights[0], down=weights[1], gate_up_bias=positive[0], down_bias=positive[1])


def hidden_sums(x: Tensor, layer: Layer, size) -> Tensor:
    """sum_k weight * |down| @ size(gate_up rows of the pair) for every token: fp64 [M, H]."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token in range(len(x)):
        for slot, id_ in enumerate(layer.ids[token].tolist()):
            expert = id_ if layer.expert_map is None else int(layer.expert_map[id_])
            if expert < 0:
                continue
            first, second = (Int8Weight(w.values[expert], w.scale[expert]) for w in (layer.gate_up, layer.down))
            bias = None if layer.gate_up_bias is None else layer.gate_up_bias[expert]
            hidden = size(reference.linear(x[token], first, bias))
            down = reference.linear(hidden.abs(), Int8Weight(second.values.abs(), second.scale))
            down += 0 if layer.down_bias is None else layer.down_bias[expert].abs().double()
            out[token] += layer.weights[token, slot].double() * down
    return out


@pytest.fixture
def check(assert_matches):
    def run(out: Tensor, x: Tensor, layer: Layer) -> None:
        assert out.dtype == x.dtype
        exact = reference.experts(x, *layer)
        # The hidden values are rounded, then each expert's output; both reach the sum at most with these sizes.
        rounded = hidden_sums(x, layer, lambda rows: reference.activated(rows, *layer[7:]))
        positive_x, positive = absolute(x, layer)
        magnitude = hidden_sums(positive_x, positive, lambda rows: products(rows, layer))
        assert_matches(out, exact, magnitude, rounded, rounded, half_ulp=HALF_ULP.get(x.dtype))

    return run


def products(rows: Tensor, layer: Layer) -> Tensor:
    """gate * up of rows without signs, with what the activation adds to up."""
    oai = layer.activation == "swigluoai"
    gate, up = (rows[..., 0::2], rows[..., 1::2]) if oai else rows.chunk(2, dim=-1)
    return gate * (up + oai)


@on_each_device
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "topk", "many", "h", "i"), [(1, 1, 1, 16, 1), (3, 2, 5, 70, 37), (21, 2, 4, 64, 48)])
def test_the_kernels_say_what_the_oracle_says(check, device, tile, dtype, m, topk, many, h, i):
    x, layer = case(m, topk, many, h, i, dtype, device)
    check(experts(x, *layer.flat(), tile=TILES[tile]), x, layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "topk", "many", "h", "i"), [(1, 1, 1, 16, 1), (3, 2, 5, 70, 37), (40, 3, 4, 64, 64)])
def test_the_cpu_says_what_the_oracle_says(assert_matches, dtype, m, topk, many, h, i):
    x, layer = case(m, topk, many, h, i, dtype, "cpu")
    exact, size = reference.experts(x, *layer), hidden_sums(x, layer, lambda rows: reference.activated(rows))
    magnitude = hidden_sums(*absolute(x, layer), lambda rows: products(rows, layer))
    # gate and up are rounded twice and silu(gate) once, as in `swiglu`; the output of an expert twice.
    assert_matches(cpu.experts(x, *layer.flat()), exact, magnitude, *[1.1 * size] * 6, *[size] * 2)


SKEWED = {
    "all to one": torch.full((40, 1), 3),
    "one gets half": torch.tensor([[2, expert] for expert in (0, 1, 3, 4, 5)] * 7),
    "none to the last": torch.tensor([[0, 1]] * 17 + [[1, 0]] * 18),
    "twice the same": torch.tensor([[4, 4], [4, 1]]),
    "as many as a block": torch.full((16, 1), 5),
}


@on_each_device
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("routing", SKEWED)
def test_skewed_routing(check, device, tile, routing):
    x, layer = case(len(SKEWED[routing]), 0, 6, 48, 40, torch.float32, device, ids=SKEWED[routing])
    check(experts(x, *layer.flat(), tile=TILES[tile]), x, layer)


@on_each_device
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("m", [2, 20])
def test_experts_of_other_gpus_are_left_out(check, device, tile, m):
    expert_map = torch.tensor([-1, 1, -1, 0, 2, -1], dtype=torch.int32, device=device)
    ids = distinct_ids(m, 2, 6, device)
    ids[0] = torch.tensor([0, 2])
    x, layer = case(m, 2, 3, 48, 40, torch.float32, device, expert_map=expert_map, ids=ids)
    out = experts(x, *layer.flat(), tile=TILES[tile])
    assert not out[0].any()
    check(out, x, layer)
    if device == "cpu":
        check(cpu.experts(x, *layer.flat()), x, layer)


@on_each_device
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_biases_and_clamped_activations(check, device, tile, activation, limit):
    biases = dict(gate_up_bias=torch.randn(4, 80, device=device), down_bias=torch.randn(4, 48, device=device))
    x, layer = case(9, 2, 4, 48, 40, torch.float32, device, activation=activation, limit=limit, **biases)
    check(experts(x, *layer.flat(), tile=TILES[tile]), x, layer)
    if device == "cpu":
        check(cpu.experts(x, *layer.flat()), x, layer)


@on_each_device
@pytest.mark.parametrize("tile", TILES)
def test_same_input_gives_the_same_bits(device, tile):
    x, layer = case(21, 2, 4, 64, 64, torch.bfloat16, device)
    first = experts(x, *layer.flat(), tile=TILES[tile])
    assert torch.equal(first, experts(x, *layer.flat(), tile=TILES[tile]))


@on_each_device
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_nan_of_one_token_reaches_no_other(device, index):
    x, layer = case(20, 2, 3, 48, 40, torch.float32, device)
    layer = layer._replace(ids=layer.ids.to(index))
    x[7] = float("nan")
    for tile in TILES.values():
        out = experts(x, *layer.flat(), tile=tile)
        assert out[7].isnan().all()
        assert out.isnan().any(1).sum() == 1


@on_each_device
@pytest.mark.parametrize("tile", TILES)
def test_results_go_where_the_caller_wants_them(check, device, tile):
    """Into memory that is also used for what is between, as in vLLM."""
    x, layer = case(4, 2, 3, 48, 40, torch.float32, device)
    scratch = torch.full((4, 2, 50), float("nan"), device=device), torch.full((500,), float("nan"), device=device)
    out = scratch[0].view(-1)[: 4 * 48].view(4, 48)
    assert experts(x, *layer.flat(), tile=TILES[tile], out=out, scratch=scratch) is out
    check(out, x, layer)


@on_each_device
def test_no_tokens(device):
    x, layer = case(0, 2, 3, 48, 40, torch.float32, device)
    assert experts(x, *layer.flat()).shape == (0, 48)


@on_each_device
@pytest.mark.parametrize("pairs", [1, 5, 1025, 3000])
def test_pairs_are_sorted_by_expert(device, pairs):
    ids = torch.randint(0, 7, (pairs, 1), device=device)
    ids[ids == 2] = 3
    routing = route(ids, None, 7, 16)
    assert torch.equal(routing.order.long(), ids[:, 0].argsort(stable=True))
    counts = torch.bincount(ids[:, 0], minlength=7)
    assert torch.equal(routing.counts[:7].long(), counts)
    number = int(routing.counts[7])
    assert number == sum(-(-count // 16) for count in counts.tolist()) <= routing.most_blocks
    covered = [(int(e), place) for e, a, b in routing.blocks[:, :number].T for place in range(a, b)]
    assert covered == list(zip(ids[:, 0].sort().values.tolist(), range(pairs), strict=True))


def test_no_routing_has_more_blocks_than_the_host_allows_for():
    for pairs, experts_, block in [(1, 8, 16), (100, 8, 16), (7, 128, 16), (1000, 3, 64)]:
        used = min(pairs, experts_)
        worst = [pairs - (used - 1), *[1] * (used - 1)]
        assert sum(-(-count // block) for count in worst) <= most_blocks(pairs, experts_, block)


def test_tiles_follow_the_tokens_of_an_expert():
    card = Card(232_448, 132)
    assert pick_tile(1, 8, 128, 2, card).block_m == 1
    widths = [pick_tile(m, 8, 128, 2, card).block_m for m in (32, 128, 256, 1024, 8192)]
    assert widths == sorted(widths)
    assert widths[0] == 16
    small = pick_tile(8192, 8, 128, 4, Card(101_376, 0))
    assert max(small.gate_up.shared_memory(4), small.down.shared_memory(4)) <= 101_376


@pytest.mark.parametrize("change", [{"narrow": 24}, {"narrow": 64}, {"down": TritonTile(16, 16, 64, 2, 2)}])
def test_tiles_that_no_kernel_can_run_are_not_made(change):
    with pytest.raises(ValueError, match=r"narrow must be|same block_m"):
        replace(NARROW, **change)


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
def test_opcheck(leading):
    x, layer = case(6, 2, 3, 48, 40, torch.float32, "cpu", expert_map=torch.tensor([0, -1, 2]))
    x, weights, ids = (each[0].expand(*leading, -1) for each in (x, layer.weights, layer.ids))
    layer = layer._replace(weights=weights, ids=ids)
    torch.library.opcheck(torch.ops.rowint8.experts.default, (x, *layer.flat()))
    one = layer._replace(weights=weights.reshape(-1, 2)[:1], ids=ids.reshape(-1, 2)[:1])
    out = ops.experts(x, *layer.flat())
    assert out.shape == x.shape
    assert torch.allclose(out.view(-1, 48)[:1], ops.experts(x.reshape(-1, 48)[:1], *one.flat()), atol=1e-4)


BAD = {
    "float64": (lambda x, g: (x.double(), *g), "accepted are float32, bfloat16 and float16"),
    "another H": (lambda x, g: (x[:, 1:], *g), "do not match experts of H = 48"),
    "another E": (lambda x, g: (x, g[0][1:].contiguous(), g[1][1:], *g[2:]), r"must be \[E, 2I, H\] and \[E, H, I\]"),
    "an fp32 scale": (lambda x, g: (x, g[0], g[1].float(), *g[2:]), "gate_up's scale must be float16"),
    "float values": (lambda x, g: (x, g[0].float(), *g[1:]), "gate_up must be a contiguous int8 tensor"),
    "ids of other tokens": (lambda x, g: (x[1:], *g), r"ids must be int32 or int64 \[5, 'k'\]"),
    "other weights": (lambda x, g: (x, *g[:4], g[4][:, 1:], *g[5:]), r"weights must be floating \[6, 2\]"),
    "a map [1, E]": (lambda x, g: (x, *g[:8], torch.zeros(1, 3).int(), *g[9:]), "expert_map must be int32 or int64"),
    "an activation": (lambda x, g: (x, *g[:9], "gelu", *g[10:]), "activation is 'gelu'; accepted are silu and"),
    "elsewhere": (lambda x, g: (x.to("meta"), *g), "activations are on meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_refused(bad):
    x, layer = case(6, 2, 3, 48, 40, torch.float32, "cpu")
    change, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        ops.experts(*change(x, layer.flat()))
