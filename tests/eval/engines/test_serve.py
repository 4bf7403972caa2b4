"""rowint8.eval.engines.serve: flags that vLLM knows, rows of what its client reports. A script stands in for `vllm`."""

import io
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rowint8.eval.cli import app as cli
from rowint8.eval.engines import serve as bench_serve
from rowint8.eval.engines import server as serve
from rowint8.eval.engines.serve import (
    Load,
    parse_goodput,
    parse_rates,
    row_of,
    server_arguments,
    server_flags,
)
from rowint8.eval.engines.setups import SERVED, SETUPS, write_shape, write_tokenizer
from rowint8.eval.errors import EvalError
from rowint8.eval.report.serve import serve_table
from rowint8.eval.results.files import read_results

LOAD = Load(prompt_tokens=32, output_tokens=8, seconds=2.5, goodput={"ttft": 200.0, "tpot": 50.0})
REPORT = {
    "num_prompts": 10,
    "completed": 10,
    "total_output_tokens": 80,
    "output_throughput": 31.5,
    "request_goodput": 3.5,
    **{f"p{p}_{metric}_ms": p + i for p in (50, 95, 99) for i, metric in enumerate(("ttft", "tpot", "itl"))},
}
VLLM = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
option = lambda name: sys.argv[sys.argv.index(name) + 1]
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
if sys.argv[1] == "serve":
    if "fp8" in sys.argv:
        sys.exit("ValueError: no fp8 here")
    HTTPServer(("127.0.0.1", int(option("--port"))), Healthy).serve_forever()
report, sent = json.loads(REPORT), int(option("--num-prompts"))
report |= {"num_prompts": sent, "completed": sent, "total_output_tokens": sent * int(option("--random-output-len"))}
with open(option("--result-dir") + "/" + option("--result-filename"), "w") as file:
    json.dump(report, file)
"""


def test_a_row_of_a_report():
    row = row_of("rowint8", 4.0, LOAD, REPORT, "vllm bench serve")
    assert (row.ttft_ms, row.tpot_ms, row.itl_ms) == (
        {"p50": 50, "p95": 95, "p99": 99},
        {"p50": 51, "p95": 96, "p99": 100},
        {"p50": 52, "p95": 97, "p99": 101},
    )
    assert (row.requests, row.tok_s, row.goodput, row.request_rate) == (10, 31.5, 3.5, 4)
    assert line(row) == ["4", "rowint8", "1", "50.0", "95.0", "99.0", "51.0", "100.0", "-", "31.5", "3.50"]


def line(*rows):
    """The cells of the only line of the table."""
    console = Console(file=io.StringIO(), width=80)
    console.print(serve_table(rows))
    drawn = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "ttft <= 200 ms, tpot <= 50 ms" in " ".join(drawn.split())
    (found,) = [line.split() for line in drawn.splitlines() if " rowint8 " in line]
    return found


def test_runs_of_a_setup_at_a_rate_are_one_line_of_medians():
    row = row_of("rowint8", 4.0, LOAD, REPORT, "vllm bench serve")
    runs = [
        replace(row, tok_s=tok_s, ttft_ms=row.ttft_ms | {"p99": p99}) for tok_s, p99 in ((10, 80), (30, 100), (20, 90))
    ]
    assert line(*runs) == ["4", "rowint8", "3", "50.0", "95.0", "90.0", "51.0", "100.0", "22%", "20.0", "3.50"]
    older = replace(row, ttft_ms={"p50": 50.0, "p99": 99.0})
    assert line(older)[3:6] == ["50.0", "-", "99.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completed": 9}, "1 of 10 requests failed"),
        ({"completed": 9, "errors": ["", "Bad Request"]}, "the first said: Bad Request"),
        ({"total_output_tokens": 79}, "79 output tokens came"),
    ],
)
def test_lost_requests_and_tokens_are_errors(change, message):
    with pytest.raises(EvalError, match=message):
        row_of("rowint8", 4.0, LOAD, REPORT | change, "vllm bench serve")


def test_help_names_every_setup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    shown = CliRunner().invoke(cli.app, ["bench", "serve", "--help"]).stdout
    assert ", ".join(SERVED) in shown
    assert "[default: bf16,rowint8,rowint8-a8,fp8]" in shown
    assert "Example: rowint8 bench serve" in shown


def test_rates_and_limits():
    assert parse_rates("4,0.5", 20) == [4, 0.5]
    assert parse_goodput("ttft:200,tpot:50") == {"ttft": 200, "tpot": 50}


@pytest.mark.parametrize("text", ["", "4,", "0", "-1", "nan", "inf", "fast"])
def test_wrong_rates_are_refused(text):
    with pytest.raises(EvalError, match="--rates is"):
        parse_rates(text, 20)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:0", "itl:5", "ttft:200,"])
def test_wrong_limits_are_refused(text):
    with pytest.raises(EvalError, match="--goodput is"):
        parse_goodput(text)


def test_setups_that_need_more_than_flags_are_not_served():
    assert set(SETUPS) - set(SERVED) == {"humming"}


def test_flags_say_what_the_arguments_do():
    flags = server_flags({"max_model_len": 40, "enforce_eager": True, "load_format": "dummy", "hf_overrides": {"a": 1}})
    assert flags[1:] == [
        "--max-model-len",
        "40",
        "--enforce-eager",
        "--load-format",
        "dummy",
        "--hf-overrides",
        '{"a": 1}',
    ]
    assert "--enforce-eager" not in server_flags({"enforce_eager": False})


def test_vllm_knows_the_flags():
    pytest.importorskip("vllm")
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.cli import serve as vllm_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    client = FlexibleArgumentParser()
    add_cli_args(client)
    sent: Any = client.parse_args(bench_serve._client_flags(4.0, LOAD, seed=2))
    assert (sent.request_rate, sent.num_prompts, sent.random_input_len, sent.random_output_len) == (4, 10, 32, 8)
    assert (sent.ignore_eos, sent.metric_percentiles, sent.goodput) == (
        True,
        "50,95,99",
        ["ttft:200", "tpot:50"],
    )
    assert sent.seed == 2
    server = vllm_serve.make_arg_parser(FlexibleArgumentParser())  # pyright: ignore[reportPrivateImportUsage]
    for setup in SERVED.values():
        arguments = {**server_arguments(LOAD, 2, eager=True), **setup.arguments}
        served: Any = server.parse_args(["--model", "m", *server_flags(arguments)])
        assert (served.max_model_len, served.tensor_parallel_size, served.enable_prefix_caching) == (40, 2, False)
        assert served.quantization == setup.arguments.get("quantization")


def test_the_tokenizer_counts_words(tmp_path):
    from transformers import AutoTokenizer

    write_shape("tiny", tmp_path)
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 512
    assert tokenizer("000007000511000000", add_special_tokens=True).input_ids == [7, 511, 0]
    text = tokenizer.decode([3, 3, 500])
    assert tokenizer.encode(text) == [3, 3, 500]
    assert len(text) == 3 * max(map(len, tokenizer.get_vocab()))  # vLLM refuses a text that is longer


def test_a_failing_server_keeps_the_rows_of_the_others(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\nREPORT = {json.dumps(REPORT)!r}\n{VLLM}")
    script.chmod(0o755)
    for module in (serve, bench_serve):
        monkeypatch.setattr(module, "console_script", lambda name: str(script))
    options = [
        "--config",
        "tiny",
        "--rates",
        "2,4",
        "--seconds",
        "5",
        "--repeats",
        "2",
        "--json",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(cli.app, ["bench", "serve", "--setups", "bf16,fp8,rowint8", *options])
    assert str(done.exception).startswith("failed: fp8")
    assert "no fp8 here" in done.stderr
    rows = read_results(tmp_path / "r.json").rows
    assert [(row.setup, row.request_rate, row.requests) for row in rows] == [
        (setup, rate, round(rate * 5)) for setup in ("bf16", "rowint8") for rate in (2, 2, 4, 4)
    ]
    assert [row.command.partition("--seed ")[2][0] for row in rows] == ["0", "1"] * 4
    assert all(str(tmp_path) not in row.command for row in rows)
