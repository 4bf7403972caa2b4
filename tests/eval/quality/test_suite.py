"""rowint8.eval.quality.suite: rows and tables of made-up runs, errors, and one run of the command with real models."""

import importlib.util
import io
import json
import math

import pytest
from rich.console import Console

from rowint8.eval.errors import EvalError
from rowint8.eval.quality.paired import Item, metric_value
from rowint8.eval.quality.suite import BACKENDS, _lm_eval_model, choose, context_of, quality_rows
from rowint8.eval.report.quality import quality_tables
from rowint8.eval.results.files import read_results
from tests.eval.cli.test_app import rowint8


def metric(name, *items, stderr=None):
    items = [Item(*part) if isinstance(part, tuple) else Item(float(part), 1.0) for part in items]
    return {"value": metric_value(name, items), "stderr": stderr, "items": items}


def run(acc, logprob, pages):
    text = {"word_perplexity": metric("word_perplexity", *pages)}
    choice = {"acc": metric("acc", *acc, stderr=0.25), "logprob": metric("logprob", *logprob)}
    return {"tasks": {"text": {"documents": 2, "metrics": text}, "choice": {"documents": 4, "metrics": choice}}}


BASE = run([1, 1, 0, 0], [-1.0, -2.0, -3.0, -4.0], [(-30.0, 10), (-20.0, 10)])
OTHER = run([1, 0, 1, 1], [-1.5, -2.0, -3.5, -4.0], [(-31.0, 10), (-20.5, 10)])


def rows_of(other=OTHER):
    base = quality_rows(BACKENDS["transformers"], "float32", BASE, None)
    return [*base, *quality_rows(BACKENDS["vllm-rowint8"], "float32", other, BASE)]


def test_rows():
    by_key = {(row.setup, row.metric): row for row in rows_of()}
    assert len(by_key) == 6
    assert by_key["unquantized", "acc"].difference is None
    accuracy = by_key["rowint8", "acc"]
    assert (accuracy.task, accuracy.questions, accuracy.engine, accuracy.stderr) == ("choice", 4, "vllm", 0.25)
    assert (accuracy.value, accuracy.difference, accuracy.gained, accuracy.lost) == (0.75, 0.25, 2, 1)
    logprob = by_key["rowint8", "logprob"]
    assert (logprob.value, logprob.difference, logprob.gained) == (-2.75, -0.25, None)
    assert logprob.difference_stderr == pytest.approx(math.sqrt(0.25 / 3) / 2)
    assert logprob.stderr == pytest.approx(math.sqrt((1.25**2 + 0.75**2 + 0.75**2 + 1.25**2) / 3) / 2)
    words = by_key["rowint8", "word_perplexity"]
    assert words.difference == pytest.approx(math.exp(51.5 / 20) - math.exp(50 / 20))
    # without either page: exp(2.05) - exp(2.0) and exp(3.1) - exp(3.0); two values stray by half their distance
    distance = (math.exp(3.1) - math.exp(3.0)) - (math.exp(2.05) - math.exp(2.0))
    assert words.difference_stderr == pytest.approx(distance / 2)


def test_no_difference_where_the_metric_is_made_in_another_way():
    other = run([1, 0, 1, 1], [-1.5, -2.0, -3.5, -4.0], [(-31.0, 10), (-20.5, 10)])
    other["tasks"]["choice"]["metrics"]["acc"]["value"] = 0.8
    other["tasks"]["choice"]["metrics"]["logprob"]["items"] = None
    for row in rows_of(other)[-2:]:
        assert (row.difference, row.difference_stderr, row.gained, row.lost) == (None,) * 4
    assert rows_of(other)[-1].stderr is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_no_number_is_one_line(value):
    other = run([1, 0, 1, 1], [value, -2.0, -3.5, -4.0], [(-31.0, 10), (-20.5, 10)])
    with pytest.raises(EvalError, match=r"^choice: logprob of vllm rowint8 is -?(nan|inf); the model's logits are "):
        rows_of(other)


def test_tables():
    console = Console(file=io.StringIO(), width=80)
    for table in quality_tables(rows_of()):
        console.print(table)
    drawn = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert drawn.index("choice: 4 questions, arithmetic in float32") < drawn.index("text: 2 questions")
    (line,) = [line.split() for line in drawn.splitlines() if "vllm-rowint8" in line and "acc" in line]
    assert " ".join(line) == "acc vllm-rowint8 0.7500 ± 0.2500 +0.2500 ± 0.4787 2 1"
    assert "from transformers" in drawn


def test_context_leaves_vllm_its_two_tokens(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    assert (context_of(tmp_path, 1024), context_of(tmp_path, 100)) == (510, 100)


def test_backends_are_checked_before_anything_runs(monkeypatch):
    assert list(choose("vllm, baseline")) == ["vllm", "baseline"]
    with pytest.raises(EvalError, match=f"--backends has 'hf', ''; accepted are {', '.join(BACKENDS)}"):
        choose("hf,vllm,")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(EvalError, match=r"vllm is not installed; run `pip install 'rowint8\[vllm\]'` or leave vllm-"):
        choose("baseline,vllm-rowint8")


@pytest.mark.vllm
def test_command_compares_backends(smollm2, tmp_path):
    file = tmp_path / "quality.json"
    backends = "baseline-rowint8,vllm-rowint8"
    done = rowint8("quality", "--model", smollm2, "--backends", backends, "--limit", "20", "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|rowint8_basics|") == 2, "lm-eval's own tables"
    results = read_results(file)
    by_key = {(row.engine, row.metric): row for row in results.rows}
    assert len(by_key) == len(results.rows) == 6
    assert by_key["baseline", "acc"].value >= 0.7, "by chance it would be at most 0.5"
    assert abs(by_key["vllm", "logprob"].difference) < 1e-3, "the same INT8 weights in two engines"
    assert json.loads(file.read_text())["rows"][0]["questions"] == 20


def test_backends_with_int8_activations_say_so_to_their_engines():
    name, arguments = _lm_eval_model(BACKENDS["baseline-rowint8-a8"], "float32", 128)
    assert (name, arguments["quantization"], arguments["activations"]) == ("baseline", "rowint8", "int8")
    name, arguments = _lm_eval_model(BACKENDS["vllm-rowint8-a8"], "float32", 128)
    assert name == "vllm"
    assert arguments["hf_overrides"]["quantization_config"]["activations"] == "int8"
    assert "activations" not in _lm_eval_model(BACKENDS["baseline-rowint8"], "float32", 128)[1]
    assert _lm_eval_model(BACKENDS["vllm"], "float32", 128)[1] == {"max_model_len": 130, "enforce_eager": True}
