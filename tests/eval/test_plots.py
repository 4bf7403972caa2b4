"""rowint8.eval.plots: pictures of what the results hold, and the same results give the same file."""

from dataclasses import replace

import pytest

from rowint8.eval.errors import EvalError
from rowint8.eval.plots import pictures
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results
from tests.eval.report.test_document import ENGINE
from tests.eval.results.test_roofline import CEILINGS, CHAIN, LINEAR, NORM


@pytest.fixture(scope="module")
def results():
    bf16 = replace(ENGINE, engine="vllm", setup="bf16", tpot_ms=10.0, spread={"tpot_ms": 0.02})
    rows = [bf16, replace(bf16, setup="rowint8", tpot_ms=5.0), replace(bf16, setup="fp8", tpot_ms=6.0)]
    rows += [replace(row, batch=8, tpot_ms=row.tpot_ms + 1) for row in rows]
    prompt = dict(output_tokens=1, tpot_ms=None, itl_ms=None)
    rows += [replace(bf16, ttft_ms=40.0, **prompt), replace(rows[1], ttft_ms=20.0, **prompt)]
    return Results(environment=describe_environment(), command="c", rows=tuple(rows))


def draw(results, path):
    pictures({"k": results})["k-batch.svg"](path)


def test_speed_over_bf16_is_drawn_for_every_setup_batch_and_prompt(results, tmp_path):
    svg = tmp_path / "deep" / "k.svg"
    draw(results, svg)
    text = svg.read_text()
    assert text.startswith("<?xml")
    for label in ("rowint8", "fp8", "1", "8", "1 x 128", "speed over bf16's"):
        assert f">{label}</text>" in text, label
    assert text.count(">rowint8</text>") == 1, "one name in the legend for decoding and prompts"
    assert ">bf16</text>" not in text, "it is the line at 1"


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
    assert set(drawn) == {"k-ratio.svg"}
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
    assert pictures({"k": replace(results, rows=results.rows[:3])}) == {}, "one batch is no line"
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"cannot write .*file/k\.svg: Not a directory"):
        draw(results, tmp_path / "file" / "k.svg")
