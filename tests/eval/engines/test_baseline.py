"""`rowint8 bench engine`: its arithmetic on made-up times, and the whole command on a tiny model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rowint8.eval.cli.app import app
from rowint8.eval.engines import baseline as job
from rowint8.eval.engines.setups import ladder
from rowint8.eval.engines.speed import Requests, Workload, throughput_requests, uniform_requests
from rowint8.eval.errors import EvalError
from rowint8.eval.results.files import read_results

TIMES = [[1.5, 1.75], [1.25, 1.75, 2.0]]
REPEAT = {"start": 1.0, "token_times": TIMES, "host_s": 0.01}
RESULT = {
    "start_s": 7.0,
    "runs": [
        {
            "repeats": [{**REPEAT, "kv_waste": 0.1, "attention": "torch"}],
            "ranks": [{"weights": 2**29, "peak_mem": 2**30, "compiled": []}],
        }
    ],
}
REQUESTS = Requests([[1, 2], [3, 4, 5, 6]], [2, 3])


def test_a_row_follows_from_the_times():
    (row,) = job.setup_rows("int8", "baseline", [REQUESTS], RESULT)
    assert (row.engine, row.setup, row.batch, row.prompt_tokens, row.output_tokens) == ("baseline", "int8", 2, 3, 2)
    assert row.ttft_ms == pytest.approx((500 + 250) / 2)
    assert row.tpot_ms == pytest.approx((250 + 375) / 2)
    assert row.tok_s == pytest.approx(5.0)
    assert (row.weights_gib, row.peak_mem_gib, row.start_s) == (0.5, 1.0, 7.0)
    assert row.host_ms == pytest.approx(10.0)
    (theirs,) = job.setup_rows("vllm-bf16", "vllm", [REQUESTS], RESULT)
    assert (theirs.engine, theirs.setup, theirs.host_ms, theirs.kv_waste) == ("vllm", "bf16", None, None)


def test_missing_tokens_are_an_error():
    with pytest.raises(EvalError, match=r"request 2: the engine returned \d tokens"):
        job.setup_rows("int8", "baseline", [Requests(REQUESTS.prompts, [2, 4])], RESULT)


def test_the_throughput_workload_is_fixed_and_spread():
    requests = throughput_requests(1000)
    assert requests == throughput_requests(1000)
    lengths = [len(prompt) for prompt in requests.prompts]
    assert len(lengths) == len(requests.outputs) == 256
    for numbers in (lengths, requests.outputs):
        assert 100 <= min(numbers) < 150 < 950 < max(numbers) <= 1024
    assert uniform_requests(Workload(3, 8, 5), 50).outputs == [5, 5, 5]


def test_both_engines_get_the_same_limits():
    given = Path("m"), True, [REQUESTS]
    setups = ladder(gpu=True)
    arguments = {name: job.engine_arguments(setup.engine, *given) for name, setup in setups.items()}
    assert {each.get("max_context") or each["max_model_len"] for each in arguments.values()} == {7}
    assert {each.get("max_seqs") or each["max_num_seqs"] for each in arguments.values()} == {2}
    assert {each.get("memory_fraction") or each["gpu_memory_utilization"] for each in arguments.values()} == {0.9}
    assert {setup.engine for setup in ladder(gpu=False).values()} == {"baseline", "transformers"}


def test_the_command_on_a_tiny_model(tmp_path):
    file = tmp_path / "engine.json"
    setups = "bf16-eager,int8-fused,int8-a8,transformers-bf16"
    options = ["--config", "tiny", "--setups", setups, "--workloads", "1x8x3,3x8x3", "--repeats=2"]
    result = CliRunner().invoke(app, ["bench", "engine", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = read_results(file).rows
    assert [(row.engine, row.setup, row.batch) for row in rows] == [
        (*setup, batch)
        for setup in (
            *(("baseline", name) for name in ("bf16-eager", "int8-fused", "int8-a8")),
            ("transformers", "bf16"),
        )
        for batch in (1, 3)
    ]
    assert all(row.repeats == 2 and row.tok_s > 0 for row in rows)
    assert all(row.attention for row in rows[:6])
    assert rows[2].weights_gib < rows[0].weights_gib
    bad = CliRunner().invoke(app, ["bench", "engine", "--setups", "int3"])
    assert bad.exit_code != 0


def test_transformers_gets_no_requests_of_different_sizes():
    workloads = [uniform_requests(Workload(3, 8, 5), 50), throughput_requests(50, 4)]
    assert job.answerable("transformers", workloads) == workloads[:1]
    assert job.answerable("baseline", workloads) == job.answerable("vllm", workloads) == workloads
