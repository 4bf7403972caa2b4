"""The definitions of the metrics, on times chosen by hand."""

import gc
import json
import sys

import pytest
import torch

from rowint8.baseline_engine.metrics import PeakMemory, RequestMetrics, RunMetrics, speedup

FIRST = RequestMetrics(prompt_tokens=7, start=10.0, token_times=(10.5, 10.6, 10.9, 11.0))
SECOND = RequestMetrics(prompt_tokens=3, start=10.0, token_times=(11.5,))


def run_of(*requests: RequestMetrics) -> RunMetrics:
    return RunMetrics(requests, wall=2.0, peak_mem=300, weight_bytes=200, load_seconds=4.0, compile_seconds=5.0)


def test_a_request():
    assert FIRST.output_tokens == 4
    assert FIRST.ttft == pytest.approx(0.5)
    assert FIRST.itl == pytest.approx([0.1, 0.3, 0.1])
    assert FIRST.tpot == pytest.approx(0.5 / 3)


def test_a_single_token_has_no_gaps():
    assert (SECOND.ttft, SECOND.itl, SECOND.tpot) == (1.5, [], None)


def test_a_run():
    run = run_of(FIRST, SECOND)
    assert run.output_tokens == 5
    assert run.tok_s == 2.5
    assert run.ttft == pytest.approx(1.0)
    assert run.itl == pytest.approx(0.1), "the median of all gaps"
    assert run.tpot == FIRST.tpot


def test_json_has_milliseconds_and_null_for_what_is_undefined():
    result = json.loads(json.dumps(run_of(SECOND).to_dict(), allow_nan=False))
    assert (result["ttft_ms"], result["itl_ms"], result["tpot_ms"]) == (1500, None, None)
    assert (result["peak_mem_bytes"], result["weight_bytes"], result["wall_s"]) == (300, 200, 2.0)
    assert (result["load_s"], result["compile_s"]) == (4.0, 5.0)
    full = run_of(FIRST).to_dict()["requests"][0]
    assert (full["prompt_tokens"], full["output_tokens"]) == (7, 4)
    assert full["itl_ms"] == pytest.approx([100, 300, 100])


def test_speedup_is_above_one_when_faster():
    assert speedup(3.0, 2.0) == 1.5


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_peak_memory_sees_what_is_freed_again_and_forgets_it_on_reset():
    gc.collect()  # what other tests left would be freed while this one looks
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    before = peak.read()
    big = torch.ones(1 << 28, dtype=torch.uint8)
    del big
    assert peak.read() - before > 0.9 * (1 << 28)
    peak.reset()
    assert peak.read() - before < 0.5 * (1 << 28)
