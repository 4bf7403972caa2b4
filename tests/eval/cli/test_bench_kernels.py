"""The command `rowint8 bench kernels`, as far as it goes without a GPU."""

from dataclasses import replace

import pytest
import torch

from rowint8.eval.cli import kernels
from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.shapes import CHAIN_COUNTS, EVERY_COUNT
from rowint8.eval.results.files import read_results
from tests.eval.cli.test_app import rowint8
from tests.eval.results.test_roofline import CEILINGS, CHAIN, LINEAR


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_timing_without_a_gpu_is_one_line(tmp_path):
    done = rowint8("bench", "kernels", "--peers", "--json", tmp_path / "k.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rowint8: kernels are timed on a CUDA GPU; torch finds none here\n"
    assert not (tmp_path / "k.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_a_chain_without_a_gpu_is_one_line(tmp_path):
    done = rowint8("bench", "chain", "--json", tmp_path / "c.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rowint8: chains are timed on a CUDA GPU; torch finds none here\n"
    assert not (tmp_path / "c.json").exists()


class Bench:
    """Instead of one that needs a GPU."""

    def __init__(self, *given):
        pass

    def rows(self, shapes, tokens):
        for shape in shapes:
            yield from (replace(LINEAR, shape=shape.name, M=m) for m in tokens)


class Int8Bench(Bench):
    def rows(self, shapes, tokens):
        for shape in shapes:
            yield from (replace(LINEAR, op="linear_int8", shape=shape.name, M=m) for m in tokens)


@pytest.fixture
def bench(monkeypatch):
    """The command with rows that cost nothing."""
    monkeypatch.setattr(kernels, "_require_gpu", lambda what: None)
    monkeypatch.setattr("rowint8.eval.kernels.bench.KernelBench", Bench)
    monkeypatch.setattr("rowint8.eval.kernels.int8_bench.Int8Bench", Int8Bench)
    monkeypatch.setattr("rowint8.eval.kernels.timing.measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr("sys.argv", ["rowint8", "bench", "kernels"])
    return kernels.bench_kernels


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch, bench):
    path = tmp_path / "k.json"
    found: list[list[int]] = []
    monkeypatch.setattr(kernels, "_WRITE_EVERY_S", 0.0)

    def rows(self, shapes, tokens):
        for m in (1, 2, 4):
            yield replace(LINEAR, M=m)
            found.append([row.M for row in read_results(path).rows])
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        bench("gate_up", json_file=path)
    assert found == [[1], [1, 2], [1, 2, 4]]
    assert read_results(path).ceilings == CEILINGS


def test_cells_are_appended_and_measured_anew_in_their_place(tmp_path, bench):
    path = tmp_path / "k.json"
    for shapes, tokens in (("gate_up", "1,2"), ("o", "2"), ("gate_up", "2,4")):
        bench(shapes, tokens, json_file=path, append=True)
    cells = [("gate_up", 1), ("gate_up", 2), ("o", 2), ("gate_up", 4)]
    assert [(row.shape, row.M) for row in read_results(path).rows] == cells


def test_an_operator_of_int8_tokens_is_timed_where_it_is_asked_for(tmp_path, bench, capsys):
    path = tmp_path / "k.json"
    bench("gate_up,h4096", "2", "linear_int8", json_file=path)
    assert [(row.op, row.shape) for row in read_results(path).rows] == [("linear_int8", "gate_up")]
    assert "linear_int8: microseconds a call" in capsys.readouterr().out
    with pytest.raises(EvalError, match="--shapes h4096 has nothing for --op swiglu_int8"):
        bench("h4096", "2", "swiglu_int8")


def test_every_count_is_the_default(tmp_path, bench, capsys):
    bench("o", json_file=tmp_path / "k.json")
    assert tuple(row.M for row in read_results(tmp_path / "k.json").rows) == EVERY_COUNT
    assert "The 10 worst cells" in capsys.readouterr().out


def test_the_chain_command_keeps_and_shows_its_rows(tmp_path, monkeypatch, capsys):
    class Chains:
        def __init__(self, announce, layers):
            assert layers == 32

        def rows(self, tokens):
            for m in tokens:
                yield from (replace(CHAIN, M=m, chain="bf16", ratio=None), replace(CHAIN, M=m))

    monkeypatch.setattr(kernels, "_require_gpu", lambda what: None)
    monkeypatch.setattr("rowint8.eval.kernels.chain.ChainBench", Chains)
    monkeypatch.setattr("sys.argv", ["rowint8", "bench", "chain"])
    for tokens in (None, "1,9"):
        kernels.bench_chain(tokens, json_file=tmp_path / "c.json", append=True)
    rows = read_results(tmp_path / "c.json").rows
    assert [row.M for row in rows] == [m for m in (*CHAIN_COUNTS, 9) for _ in range(2)]
    assert "32 layers of llama-3.1-8b" in capsys.readouterr().out
