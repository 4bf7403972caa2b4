"""Kernel rows as tables and plots, and the commands that make them."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rowint8.eval.errors import EvalError
from rowint8.eval.kernels.table import best_peer, kernel_tables, limit_us
from rowint8.eval.plot_kernels import plot_kernels
from rowint8.eval.processes import console_script
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, read_results, write_results
from rowint8.eval.results.schema import Ceilings, KernelRow

CEILINGS = Ceilings(read_tb_s=2.0, bf16_tflop_s=500.0)
LINEAR = KernelRow(
    op="linear",
    shape="gate_up",
    M=1,
    N=28672,
    K=4096,
    us=dict(rowint8=80.0, cublas_bf16=160.0, machete=100.0),
    spread=dict(rowint8=0.01, cublas_bf16=0.02, machete=0.035),
)
NORM = KernelRow(
    op="add_rms_norm",
    shape="h4096",
    M=1024,
    N=4096,
    K=4096,
    us=dict(rowint8=20.0, vllm=16.0),
    spread=dict(rowint8=0.0, vllm=0.0),
)


def printed(rows):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in kernel_tables(rows, CEILINGS):
        console.print(table)
    return console.export_text()


def test_limit_is_reading_or_computing():
    moved = 28672 * 4096 + 2 * 28672 + 2 * 4096
    assert limit_us(LINEAR, CEILINGS) == pytest.approx(moved / 2e6)
    many = replace(LINEAR, M=4096)
    assert limit_us(many, CEILINGS) == pytest.approx(2 * 4096 * 28672 * 4096 / 500e6)
    assert limit_us(NORM, CEILINGS) == pytest.approx(4 * 1024 * 4096 * 2 / 2e6)


def test_the_best_peer_is_the_fastest_that_is_not_ours():
    assert best_peer(LINEAR) == "machete"
    assert best_peer(replace(LINEAR, us=dict(rowint8=1.0, unfused=1.5, cublas_bf16=2.0))) == "cublas_bf16"
    assert best_peer(replace(LINEAR, us=dict(rowint8=1.0))) is None


def test_table_shows_ratio_rates_and_share_of_the_limit():
    lines = printed([LINEAR, NORM]).splitlines()
    (linear,) = (line.split() for line in lines if line.strip().startswith("gate_up"))
    assert linear == ["gate_up", "1", "80.0", "160.0", "100.0", "0.80", "machete", "1469", "2.9", "73%"]
    (norm,) = (line.split() for line in lines if line.strip().startswith("h4096"))
    assert norm == ["h4096", "1024", "20.0", "16.0", "1.25", "vllm", "1678", "84%"]
    text = " ".join(" ".join(lines).split())
    assert "largest spread 3.5%" in text
    assert "linear: microseconds a call, bfloat16 activations" in text


@pytest.fixture
def results_file(tmp_path):
    rows = [replace(LINEAR, M=m, us={name: us * m for name, us in LINEAR.us.items()}) for m in (1, 16, 4)]
    results = Results(environment=describe_environment(), command="c", rows=(*rows, NORM), ceilings=CEILINGS)
    write_results(tmp_path / "r.json", results)
    return tmp_path / "r.json"


def rowint8(*arguments):
    command = [console_script("rowint8"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_plot_draws_every_name_and_the_limit(results_file, tmp_path):
    svg = tmp_path / "deep" / "k.svg"
    done = rowint8("bench", "plot-kernels", results_file, svg)
    assert done.returncode == 0, done.stderr
    text = svg.read_text()
    assert text.startswith("<?xml")
    for label in ("rowint8", "cublas_bf16", "machete", "vllm", "limit", "linear gate_up [28672, 4096], bfloat16"):
        assert f">{label}</text>" in text
    assert ">add_rms_norm h4096 [4096], bfloat16</text>" in text


def test_plot_of_the_same_results_is_the_same_file(results_file, tmp_path):
    results = read_results(results_file)
    for name in ("a.svg", "b.svg"):
        plot_kernels(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_plot_says_what_it_cannot_do(results_file, tmp_path):
    results = read_results(results_file)
    with pytest.raises(EvalError, match="no ceilings"):
        plot_kernels(replace(results, ceilings=None), tmp_path / "k.svg")
    with pytest.raises(EvalError, match=r"cannot write .*k\.nonsense: "):
        plot_kernels(results, tmp_path / "k.nonsense")


def test_plot_of_a_file_without_kernel_rows_is_one_line(tmp_path):
    done = rowint8("bench", "plot-kernels", tmp_path / "none.json", tmp_path / "k.svg")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("rowint8: cannot read ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_timing_without_a_gpu_is_one_line(tmp_path):
    done = rowint8("bench", "kernels", "--peers", "--json", tmp_path / "k.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rowint8: kernels are timed on a CUDA GPU; torch finds none here\n"
    assert not (tmp_path / "k.json").exists()


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    from rowint8.eval.cli import bench_kernels as cli_bench_kernels

    monkeypatch.setattr("sys.argv", ["rowint8", "bench", "kernels"])
    path = tmp_path / "k.json"
    rows = []
    for m in (1, 2, 4):
        rows.append(replace(LINEAR, M=m))
        cli_bench_kernels._keep(path, rows, CEILINGS)
        assert [row.M for row in read_results(path).rows] == [row.M for row in rows]
    assert read_results(path).ceilings == CEILINGS


def test_shipped_results_can_be_read_and_drawn(tmp_path):
    results = read_results(Path(__file__).parents[3] / "results" / "kernels-h100.json")
    plot_kernels(results, tmp_path / "k.svg")
    assert json.dumps(results.environment.device)[1:-1] in (tmp_path / "k.svg").read_text()
