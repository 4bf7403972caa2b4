"""Every kernel compiles for every card without a GPU, within the card's memory and without spilling registers.

Some of their variants, all of them with `--every-kernel`.
"""

import json
import os
import subprocess
import sys

import pytest

from rowint8.kernels.tiles import pick
from rowint8.kernels.tiles.card import Card
from rowint8.kernels.tiles.pick import Product, pick_hopper_tile, pick_triton_tile
from rowint8.kernels.tiles.types import HOPPER_TILES, INT8_HOPPER_TILES, TritonTile
from tests.conftest import REPO
from tests.kernels.compile_kernels import PRODUCTS, TOKENS, compare
from tests.kernels.fake_cards import CARDS

TENSOR_MEMORY = 512
"""Columns that a multiprocessor of compute capability 10.0 has."""

KNOWN_SPILLS = {
    ("sm80", "256x128x64 w8 s4"): 64,
    ("sm80", "64x64x128 w4 s2"): 16,
    ("sm86", "128x64x128 w4 s2"): 32,
    ("sm89", "128x64x128 w4 s2"): 32,
    ("sm90", "32+16x2*64x1*256"): 56,
    ("sm90", "64+16x4*64x1*64"): 32,
    ("sm90", "64+32x4*64x1*64"): 32,
    ("sm90", "128+32x2*64x1*128"): 56,
    ("sm90", "128+64x2*64x1*128"): 56,
    ("sm90", "128+16x3*64x1*64"): 24,
    ("sm90", "128+64x3*64x1*64"): 136,
    ("sm90", "128+0x4*64x1*64"): 64,
    ("sm90", "128+128x2*64x1*128"): 16,
    ("sm90", "128+64x3*64x1*128"): 128,
    ("sm100", "32x64x256 w4 s3"): 32,
    ("sm120", "256x128x64 w8 s2"): 168,
}
"""Card and tile to bytes of stack per thread. On sm90 they are reached for outside the loops over K, but for
SPILLED_IN_LOOPS, and Triton 3.6 needs none of them."""

SPILLED_IN_LOOPS = {("swiglu", "128+0x4*64x1*64"): 6}
"""Operator and Hopper tile to loads and stores of spilled registers in the loops over K of its consumers together."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory, pytestconfig):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [
        sys.executable,
        "-m",
        "tests.kernels.compile_kernels",
        *([] if pytestconfig.getoption("every_kernel") else ["--few"]),
    ]
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_compiles_and_fits(reports, card):
    compiled = [report for report in reports if report["card"] == card]
    products = {"one_token_kernel", "many_tokens_kernel", "few_tokens_kernel"}
    if card == "sm90":
        products |= {"hopper_kernel"}
    expected = {(op, kernel) for op in ("linear", "swiglu") for kernel in products} | {
        ("add_rms_norm", "_add_rms_norm")
    }
    if card in ("sm80", "sm90", "sm120"):
        of_int8 = "hopper_kernel" if card == "sm90" else "many_tokens_kernel"
        expected |= {("linear_int8", of_int8), ("swiglu_int8", of_int8)}
        expected |= {(op, "_int8_tokens_kernel") for op in ("quantize_tokens", "add_rms_norm_int8")}
    expected |= {(op, kernel) for op, kernels in kernels_of_experts(card).items() for kernel in kernels}
    assert {(report["op"], report["kernel"]) for report in compiled} == expected
    for report in compiled:
        assert report["shared"] <= CARDS[card].shared_memory, report
        assert report["tensor_memory"] <= TENSOR_MEMORY, report


def kernels_of_experts(card: str) -> dict[str, set[str]]:
    """By operator. On sm90 the Triton kernel has those of gpt-oss alone. sm86 and sm89 run sm80's code."""
    if card in ("sm86", "sm89"):
        return {}
    around = {"count_kernel", "sort_kernel", "sum_kernel"}
    kernels = around | {"pairs_gate_up_kernel", "pairs_down_kernel", "grouped_kernel"}
    if card != "sm90":
        return {"experts": kernels}
    by_tma = {"gather_kernel", "hopper_kernel"}
    return {"experts": kernels | by_tma, "experts_int8": around | by_tma | {"_int8_tokens_kernel"}}


@pytest.mark.parametrize("card", CARDS)
def test_no_kernel_spills(reports, card):
    """But for what is known. A K off 16 costs address registers: it is only compiled."""
    aligned = [report for report in reports if report["card"] == card and report["k"] % 16 == 0]
    assert aligned
    for report in aligned:
        assert report["stack"] + report["local"] <= KNOWN_SPILLS.get((card, report["tile"]), 0), report


def test_loops_over_k_have_their_addresses_at_hand(reports):
    """Else the Hopper kernel takes up to 1.45 times as long: see `stream_k`."""
    multiplying = [report for report in reports if report["kernel"] == "hopper_kernel"]
    assert len(multiplying) >= 10
    for report in multiplying:
        assert report["loops_over_k"] == consumers(report["tile"]), report
        assert report["fetched_addresses"] == 0, report
        assert report["spilled_in_loops"] <= SPILLED_IN_LOOPS.get((report["op"], report["tile"]), 0), report


def consumers(tile: str) -> int:
    """Across times deep, of a Hopper tile such as 128x2*64x2*64."""
    _, rows, k = tile.split("x")
    return int(rows.split("*")[0]) * int(k.split("*")[0])


def test_the_launches_take_every_shipped_tile():
    """On the card with the most shared memory, where no tile is cut."""
    card = CARDS["sm90"]
    shapes = [(op, m, n, k) for op, n, k in PRODUCTS for m in TOKENS]
    large = Card(card.shared_memory, card.processors)
    taken = {pick_triton_tile(Product(*shape, itemsize=2, aligned=False), large) for shape in shapes}
    of_int8 = [(f"{op}_int8", m, n, k) for op, m, n, k in shapes]
    taken |= {pick_triton_tile(Product(*shape, itemsize=1, aligned=False), large) for shape in of_int8}
    assert taken >= set(tiles_within(vars(pick)))
    for tiles, launched in ((HOPPER_TILES, shapes), (INT8_HOPPER_TILES, of_int8)):
        taken = {pick_hopper_tile(*shape, card.processors) for shape in launched}
        assert {tile.sizes for tile in taken if tile} == {tile.sizes for tile in tiles}


def tiles_within(value):
    """The tiles in a module's tables."""
    if isinstance(value, TritonTile):
        yield value
    elif isinstance(value, (dict, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tiles_within(each)


def test_code_of_two_versions_is_compared(tmp_path, capsys):
    for folder, versions in (("before", "aaaa"), ("after", "abbc")):
        (tmp_path / folder).mkdir()
        for name, version in enumerate(versions):
            ptx = "same" if name == 0 else version
            sass = "REG:32\nMOV;" if name < 2 else f"REG:32\n{version};"
            (tmp_path / folder / f"{name}.ptx").write_text(ptx)
            (tmp_path / folder / f"{name}.sass").write_text(sass)
    (tmp_path / "after" / "3.ptx").unlink()
    outcomes = compare(tmp_path / "before", tmp_path / "after")
    assert outcomes == {"same PTX": 1, "same SASS": 1, "different": 1, "missing": 1}
    assert "2 different: REG:32, 2 instructions -> REG:32, 2 instructions, 1 of the former" in capsys.readouterr().out
