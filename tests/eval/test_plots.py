"""rowint8.eval.plots: pictures of kernels have every name, and the same results give the same file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rowint8.eval.errors import EvalError
from rowint8.eval.plots import pictures
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, read_results
from tests.eval.results.test_roofline import CEILINGS, CHAIN, LINEAR, NORM


@pytest.fixture(scope="module")
def results():
    rows = [replace(LINEAR, M=m, us={name: us * m for name, us in LINEAR.us.items()}) for m in (1, 16, 4)]
    return Results(environment=describe_environment(), command="c", rows=(*rows, NORM), ceilings=CEILINGS)


def draw(results, path):
    pictures({"k": results})["k.svg"](path)


def test_plot_draws_every_name_and_the_limit(results, tmp_path):
    svg = tmp_path / "deep" / "k.svg"
    draw(results, svg)
    text = svg.read_text()
    assert text.startswith("<?xml")
    for label in ("rowint8", "cublas_bf16", "machete", "vllm", "limit", "linear gate_up [28672, 4096], bfloat16"):
        assert f">{label}</text>" in text
    assert ">add_rms_norm h4096 [4096], bfloat16</text>" in text


def test_plot_of_the_same_results_is_the_same_file(results, tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(results, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_every_count_is_a_cell_of_the_heat_map_and_the_lost_ones_are_crossed(tmp_path):
    rows = [replace(LINEAR, M=m, us={"rowint8": 90.0 + m, "machete": 100.0}) for m in range(1, 33)]
    rows += [replace(LINEAR, shape="o", N=4096, M=m, us={"rowint8": 50.0}) for m in (1, 2)]
    rows.append(replace(NORM, M=6000))
    results = Results(environment=describe_environment(), command="c", rows=tuple(rows), ceilings=CEILINGS)
    drawn = pictures({"k": results})
    assert set(drawn) == {"k.svg", "k-ratio.svg"}
    drawn["k-ratio.svg"](tmp_path / "r.svg")
    text = (tmp_path / "r.svg").read_text()
    for label in ("linear gate_up [28672, 4096]", "linear o [4096, 4096]", "add_rms_norm h4096 [4096]", "31", "6000"):
        assert f">{label}</text>" in text
    assert "certainly slower (21 cells)" in text, "13 to 32 tokens, and the norm"


def test_chains_are_drawn_by_their_ratio_to_bf16(tmp_path):
    rows = [replace(CHAIN, M=m) for m in (1, 300)]
    rows += [replace(row, chain="bf16", ratio=None) for row in rows]
    results = Results(environment=describe_environment(), command="c", rows=tuple(rows))
    pictures({"chain": results})["chain.svg"](tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    assert ">rowint8</text>" in text
    assert ">32 layers of llama-3.1-8b, attention left out, " in text
    assert pictures({"chain": replace(results, rows=tuple(rows[2:]))}) == {}, "bf16 alone has no ratio"


def test_plot_says_what_it_cannot_do(results, tmp_path):
    assert pictures({"k": replace(results, ceilings=None)}) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot write .*file/k\.svg: Not a directory"):
        draw(results, tmp_path / "file" / "k.svg")


def test_shipped_results_can_be_read_and_drawn(tmp_path):
    results = read_results(Path(__file__).parents[2] / "results" / "kernels-h100.json")
    draw(results, tmp_path / "k.svg")
    assert json.dumps(results.environment.device)[1:-1] in (tmp_path / "k.svg").read_text()
