"""The experts by the Hopper kernel: 16-bit tokens as the Triton kernels, INT8 tokens as product by product."""

import pytest
import torch

from rowint8.kernels import ops
from rowint8.kernels.experts import tiles
from rowint8.kernels.experts.hopper import Rotation, hopper_serves
from rowint8.kernels.experts.launch import experts
from rowint8.kernels.experts.tiles import _HOPPER, _INT8, _SORTED, pick_tile
from rowint8.kernels.tiles.card import Card, card_of
from rowint8.kernels.tiles.types import HopperTile
from tests.kernels.test_experts import case

pytestmark = pytest.mark.usefixtures("poison_empty")
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and card_of(torch.device("cuda")).hopper_processors), reason="needs a Hopper GPU"
)
ROTATION = Rotation(256, 256)
HOPPER = Card(232_448, 132)


def skewed(m: int, device: str = "cuda"):
    """Eight experts, two a token; one has half of all pairs, one has none, and one is not here."""
    ids = torch.rand(m, 7).argsort(1)[:, :2].to(torch.int32)
    ids[: m // 2 + 1, 0], ids[: m // 2 + 1, 1] = 3, 1
    x, layer = case(m, 2, 7, 512, 256, torch.bfloat16, device, ids=ids)
    here = torch.tensor([0, 1, 2, 3, -1, 4, 5], dtype=torch.int32, device=device)
    return x, layer._replace(expert_map=here)


def by_hand(x, layer):
    """INT8 tokens, expert by expert."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(layer.ids.shape[1]):
        part = torch.zeros_like(out)
        for id_, expert in enumerate(layer.expert_map.tolist()):
            rows = (layer.ids[:, slot] == id_).nonzero()[:, 0]
            if expert < 0 or not len(rows):
                continue
            tokens = ops.quantize_tokens(x[rows], 256)
            gate_up, down = ((w.values[expert], w.scale[expert]) for w in (layer.gate_up, layer.down))
            hidden, scale = ops.quantize_tokens(ops.swiglu_int8(*tokens, *gate_up, x.dtype), 256)
            part[rows] = ops.linear_int8(hidden, scale * layer.weights[rows, slot], *down, None, x.dtype).float()
        out += part
    return out.to(x.dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", [tile for _, tile in _HOPPER], ids=lambda tile: str(tile.sizes))
def test_16_bit_tokens_give_what_the_triton_kernels_give(tile):
    for m in (1, 7, tile.width, 2 * tile.width + 3, 300):
        x, layer = skewed(m)
        expected = experts(x, *layer.flat(), tile=_SORTED[0][1])
        out = experts(x, *layer.flat(), tile=tile)
        torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
        assert torch.equal(out, experts(x, *layer.flat(), tile=tile))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", [tile for _, tile in _INT8], ids=lambda tile: str(tile.sizes))
def test_int8_tokens_give_the_bits_of_product_by_product(tile):
    for m in (1, 7, tile.width, 2 * tile.width + 3, 300):
        x, layer = skewed(m)
        assert torch.equal(experts(x, *layer.flat(), tile=tile, rotation=ROTATION), by_hand(x, layer))


@pytest.mark.gpu
@needs_hopper
def test_the_operator_takes_the_hopper_kernel_in_a_graph():
    x, layer = skewed(64)
    given = *layer.gate_up, *layer.down, layer.weights, layer.ids, layer.expert_map, 256, 256
    expected = by_hand(x, layer)
    ops.experts_int8(x, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.experts_int8(x, *given)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_on_the_cpu_int8_tokens_give_the_bits_of_product_by_product():
    x, layer = skewed(23, "cpu")
    given = *layer.gate_up, *layer.down, layer.weights, layer.ids, layer.expert_map
    out = ops.experts_int8(x, *given, 256, 256)
    assert torch.equal(out, by_hand(x, layer))
    torch.library.opcheck(torch.ops.rowint8.experts_int8.default, (x, *given, 256, 256))
    with pytest.raises(ValueError, match="cannot rotate 256 columns in blocks of 512"):
        ops.experts_int8(x, *given, 256, 512)


def test_tiles_of_the_hopper_kernel_follow_the_tokens_of_an_expert():
    for itemsize, shipped in ((2, _HOPPER), (1, _INT8)):
        picked = [pick_tile(m, 8, 128, itemsize, HOPPER, by_tma=True) for m in range(16, 20_000, 16)]
        assert list(dict.fromkeys(picked)) == [tile for _, tile in shipped]
        assert all(isinstance(tile, HopperTile) and tile.int8 == (itemsize == 1) for tile in picked)


def test_int8_tokens_need_a_card_and_experts_that_the_kernel_serves():
    for card, by_tma in ((HOPPER, False), (Card(166_912, 0), True)):
        with pytest.raises(ValueError, match="experts take INT8 tokens on cards of compute capability"):
            pick_tile(8, 8, 128, 1, card, by_tma)


CANNOT = {
    "another card": ((torch.bfloat16, 2048, 768), 0, "the kernel for experts needs compute capability 9.0"),
    "fp32": ((torch.float32, 2048, 768), 132, "the kernel for experts takes 16-bit activations"),
    "sizes": ((torch.bfloat16, 2048, 712), 132, "sizes of experts, 2048 and 712, are not multiples of 16"),
    "nothing": ((torch.float16, 2048, 768), 132, None),
}


@pytest.mark.parametrize("obstacle", CANNOT)
def test_what_keeps_experts_from_int8_tokens_is_known_before_they_are_loaded(monkeypatch, obstacle):
    given, processors, reason = CANNOT[obstacle]
    monkeypatch.setattr(tiles, "card_of", lambda device: Card(232_448, processors))
    assert tiles.why_not_int8(*given, torch.device("cuda")) == reason
    assert tiles.why_not_int8(*given, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("change", "serves"),
    [({}, True), ({"activation": "swigluoai"}, False), ({"limit": 7.0}, False), ({"has_bias": True}, False)],
)
def test_only_plain_experts_go_to_the_hopper_kernel(change, serves):
    x, layer = case(2, 2, 4, 64, 32, torch.bfloat16, "cpu")
    facts = {"activation": "silu", "limit": None, "has_bias": False} | change
    assert hopper_serves(x, layer.gate_up.values, layer.down.values, **facts) is serves
    assert not hopper_serves(x.float(), layer.gate_up.values, layer.down.values, **facts)
