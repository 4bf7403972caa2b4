"""`rowint8 tune`: which tiles it tries and which it chooses, with times that a test makes up."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rowint8.eval.cli.app import app
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels import tune
from rowint8.eval.kernels.shapes import Shape
from rowint8.eval.kernels.tune import candidates, write_tiles
from rowint8.eval.results.files import read_results
from rowint8.kernels import dispatch
from rowint8.kernels.tiles.types import FewTokensTile, HopperTile, TritonTile
from rowint8.kernels.tiles.user import read_tiles

CPU = torch.device("cpu")
SHAPE = Shape("small", 64, 32, ("linear", "swiglu"))
TRIED = [TritonTile(16, 16, 64, warps, 3) for warps in (1, 2, 4, 8)]
SHARED_MEMORY = {"sm80": 166_912, "sm86": 101_376, "sm90": 232_448}


class Timer:
    """Says the next of the times that were made up for the tile of the calls, the last one from then on."""

    def __init__(self, times):
        self.times, self.calls = {tile: list(us) for tile, us in times.items()}, []

    def __call__(self, calls):
        [tile] = {call.keywords["tile"] for call in calls}
        self.calls.append(tile)
        times = self.times.get(tile, [100.0])
        us = times.pop(0) if len(times) > 1 else times[0]
        if us is None:
            raise RuntimeError("out of resources")
        assert len(calls) > 1
        return us, 0.01


def choose(times, op="linear", m=4, tiles=TRIED):
    timer = Timer(times)
    [choice] = tune.choose_tiles([tune.Job(op, SHAPE, m, tiles)], 60, CPU, timer)
    return choice, timer


@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_the_fastest_is_chosen(op):
    choice, _ = choose({TRIED[2]: [50], TRIED[1]: [60]}, op)
    assert choice.tile == TRIED[2]
    assert choice.row.us == {"shipped": 100, "tuned": 50}
    assert (choice.row.op, choice.row.M, choice.row.N, choice.row.K) == (op, 4, 64, 32)
    assert choice.failed == 0


def test_the_shipped_tile_stays_within_noise():
    choice, timer = choose({TRIED[2]: [99]})
    assert choice.tile == timer.calls[0]
    assert choice.tile not in TRIED
    assert choice.row.us == {"shipped": 100, "tuned": 100}


def test_one_lucky_time_does_not_count():
    choice, _ = choose({TRIED[0]: [10, 120], TRIED[3]: [60]})
    assert choice.tile == TRIED[3]


def test_who_fails_is_left_out():
    choice, _ = choose({TRIED[0]: [None], TRIED[1]: [20, None], TRIED[2]: [70]})
    assert choice.tile == TRIED[2]
    assert choice.failed == 1


def test_who_computes_something_else_is_left_out(monkeypatch):
    exact = dispatch.run

    def wrong(*given, tile):
        return exact(*given, tile=tile) * (1.5 if tile == TRIED[0] else 1)

    monkeypatch.setattr(dispatch, "run", wrong)
    choice, _ = choose({TRIED[0]: [10], TRIED[1]: [50]})
    assert choice.tile == TRIED[1]
    assert choice.failed == 1


def test_a_card_that_does_not_run_the_shipped_tile():
    def fail(calls):
        raise RuntimeError("no kernel image")

    with pytest.raises(EvalError, match=r"TritonTile.* does not run on this card \(linear 64x32 with 4 tokens\)"):
        next(tune.choose_tiles([tune.Job("linear", SHAPE, 4, TRIED)], 60, CPU, fail))


def test_no_choice_begins_when_the_time_is_over():
    def slow(calls):
        time.sleep(0.05)
        return 1.0, 0.0

    jobs = [tune.Job("linear", SHAPE, m, []) for m in range(1, 50)]
    choices = list(tune.choose_tiles(jobs, 0.15, CPU, slow))
    assert 1 <= len(choices) <= 3
    assert [choice.row.M for choice in choices] == list(range(1, 1 + len(choices)))


def test_jobs_are_for_products_by_shape_and_tokens():
    shapes = [SHAPE, Shape("h64", 64, 64, ("add_rms_norm",))]
    jobs = tune.make_jobs(shapes, [8, 1], CPU)
    assert [(job.op, job.shape.name, job.m) for job in jobs] == [
        (op, "small", m) for op in ("linear", "swiglu") for m in (1, 8)
    ]
    assert all(job.tiles for job in jobs)


def test_kernels_that_shapes_share_are_compiled_once():
    many = tune.make_jobs([SHAPE._replace(n=n, ops=("linear",)) for n in (64, 128, 192)], [20, 30], CPU)
    one = tune.make_jobs([SHAPE._replace(ops=("linear",))], [30], CPU)
    assert len(tune.compilations(many)) == len(tune.compilations(one)) == len(one[0].tiles)
    off = tune.make_jobs([SHAPE._replace(n=n, ops=("linear",)) for n in (64, 72)], [30], CPU)
    assert len(tune.compilations(off)) == 2 * len(one[0].tiles)


@given(
    op=st.sampled_from(["linear", "swiglu"]),
    m=st.integers(1, 20_000),
    card=st.sampled_from(sorted(SHARED_MEMORY)),
)
def test_candidates_are_tiles_that_a_file_may_hold(op, m, card, tmp_path_factory):
    tiles = candidates(op, m, SHARED_MEMORY[card], on_hopper=card == "sm90")
    assert 2 <= len(tiles) <= 120
    assert len(set(tiles)) == len(tiles)
    path = tmp_path_factory.mktemp("tune") / "tiles.json"
    write_tiles(path, card, {(op, 1024, 4096): dict(enumerate(tiles, 1))})
    assert read_tiles(path, card) == {(op, 1024, 4096): dict(enumerate(tiles, 1))}
    for tile in tiles:
        assert card == "sm90" or not isinstance(tile, HopperTile)
        if isinstance(tile, HopperTile):
            assert m > 1
        elif isinstance(tile, FewTokensTile):
            assert 1 < m <= 8
        else:
            assert (tile.block_m == 1) == (m == 1)
            assert tile.shared_memory(2) <= SHARED_MEMORY[card]


def test_the_shapes_of_a_model(tmp_path):
    sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    assert tune.model_shapes(tmp_path) == [
        Shape("qkv", 960, 576),
        Shape("o", 576, 576),
        Shape("gate_up", 3072, 576, ("linear", "swiglu")),
        Shape("down", 576, 1536),
    ]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(EvalError, match=r"has no config.json of a dense decoder"):
        tune.model_shapes(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tiles are timed on a CUDA GPU; torch finds none here"),
        (("--shapes", "up"), "--shapes has up; accepted are"),
        (("--tokens", "1,0"), "--tokens has '0'; give whole numbers above 0"),
        (("--model", "/nowhere"), "/nowhere is not a model folder (no config.json)"),
    ],
)
def test_errors_are_one_line(arguments, message):
    if torch.cuda.is_available() and not arguments:
        pytest.skip("a GPU is here")
    command = [sys.executable, "-c", "from rowint8.eval.cli.app import main; main()", "tune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"rowint8: {message}")


def test_help_has_an_example():
    done = CliRunner().invoke(app, ["tune", "--help"])
    assert done.exit_code == 0
    assert "Example: rowint8 tune" in done.output


@pytest.fixture
def card(monkeypatch):
    """A card for the command, on which a choice takes half a minute."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(tune, "make_jobs", lambda *_: [tune.Job("linear", SHAPE, m, TRIED) for m in (1, 4)])
    monkeypatch.setattr(tune, "compile_ahead", lambda wanted, seconds, advance: [advance() for _ in wanted])

    def faked(jobs, seconds, device):
        yield from tune_on_cpu([job for job in jobs if seconds > 30 or job.m == 1], 60, CPU, Timer({TRIED[1]: [50]}))

    tune_on_cpu = tune.choose_tiles
    monkeypatch.setattr(tune, "choose_tiles", faked)


def test_the_command_writes_tiles_and_times(card, tmp_path):
    path, times = tmp_path / "tiles.json", tmp_path / "times.json"
    write_tiles(path, "NVIDIA Test", {("linear", 64, 32): {2: TRIED[0]}})
    done = CliRunner().invoke(app, ["tune", "--out", str(path), "--json", str(times)])
    assert done.exit_code == 0, done.output
    tiles = read_tiles(path, "NVIDIA Test")["linear", 64, 32]
    assert list(tiles) == [1, 2, 4], "what was there stays"
    assert (tiles[2], tiles[4]) == (TRIED[0], TRIED[1])
    rows = read_results(times).rows
    assert [(row.M, row.us) for row in rows][1] == (4, {"shipped": 100, "tuned": 50})
    assert "50%" in done.output


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(card, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "compile_ahead", lambda *_: pytest.fail("it began"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other.json").write_text("[]")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "other.json", tmp_path / "other.json" / "x"):
        done = CliRunner().invoke(app, ["tune", "--out", str(path)])
        assert isinstance(done.exception, EvalError), done.output
        assert str(path) in str(done.exception)


def test_the_command_says_what_the_time_did_not_suffice_for(card, tmp_path):
    done = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "tiles.json"), "--minutes", "0.1"])
    assert done.exit_code == 0, done.output
    assert list(read_tiles(tmp_path / "tiles.json", "NVIDIA Test")["linear", 64, 32]) == [1]
    assert "the time is over: 1 of 2 choices are missing; give more --minutes" in done.output


@pytest.mark.gpu
def test_on_a_card(tmp_path):
    device, shape = torch.device("cuda"), Shape("small", 512, 512, ("linear", "swiglu"))
    jobs = [job._replace(tiles=job.tiles[:3]) for job in tune.make_jobs([shape], [1, 16, 100], device)]
    wanted = tune.compilations(jobs)
    done = []
    tune.compile_ahead(wanted, 300, lambda: done.append(1))
    assert len(done) == len(wanted)
    choices = list(tune.choose_tiles(jobs, 300, device))
    assert len(choices) == len(jobs)
    assert all(choice.row.us["tuned"] <= choice.row.us["shipped"] for choice in choices)
    assert all(choice.failed < len(job.tiles) for choice, job in zip(choices, jobs, strict=True))
