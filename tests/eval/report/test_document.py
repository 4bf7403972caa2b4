"""rowint8.eval.report: committed documents are what the JSON gives, the missing is TBD, the impossible stops it."""

import io
import json
import re
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rowint8.eval.errors import EvalError
from rowint8.eval.markdown import fill, table
from rowint8.eval.models import weight_bytes
from rowint8.eval.plots import pictures
from rowint8.eval.processes import console_script
from rowint8.eval.report.document import card_pages, documents, page_of, parts, read_folder, refuse_mixed, report
from rowint8.eval.report.kernels import compiler_table
from rowint8.eval.report.quality import fidelity_table, quality_table
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, read_results, write_results
from rowint8.eval.results.roofline import best_peer
from rowint8.eval.results.schema import (
    GIB,
    AgreementRow,
    Ceilings,
    Compilation,
    EngineRow,
    FidelityRow,
    Generation,
    GenerationRow,
    KernelRow,
    Measured,
    QualityRow,
    ServeRow,
    VllmRow,
)
from rowint8.eval.tables import model_of

ROOT = Path(__file__).parents[3]
ENVIRONMENT = replace(describe_environment(), device="Some GPU")
CEILINGS = Ceilings(read_tb_s=3.0, bf16_tflop_s=800.0)
KERNEL = KernelRow(
    op="linear",
    shape="gate_up",
    M=16,
    N=28672,
    K=4096,
    us=dict(rowint8=50.0, cublas_bf16=90.0, marlin=48.0, unfused=20000.0),
    spread=dict(rowint8=0.01, cublas_bf16=0.02, marlin=0.03, unfused=0.0),
)
ENGINE = EngineRow(
    engine="baseline",
    setup="int8-fused",
    batch=1,
    prompt_tokens=128,
    output_tokens=101,
    ttft_ms=20.0,
    itl_ms=4.9,
    tpot_ms=5.0,
    tok_s=101 / 0.520,
    weights_gib=8.46,
    peak_mem_gib=9.25,
    repeats=3,
    spread={"tok_s": 0.01},
    start_s=10.0,
    host_ms=0.25,
    kv_waste=0.031,
    attention="flash3",
)
_SHARED: dict[str, Any] = {key: getattr(ENGINE, key) for key in Measured.__dataclass_fields__ if key != "kind"}
_SHARED |= {"engine": "vllm", "setup": "rowint8"}
VLLM = VllmRow(**_SHARED, tensor_parallel_size=1, compiled=())
SERVE = ServeRow(
    engine="vllm",
    setup="rowint8",
    request_rate=4.0,
    requests=80,
    prompt_tokens=512,
    output_tokens=128,
    ttft_ms={"p50": 31.5, "p99": 62.5},
    tpot_ms={"p50": 5.5, "p99": 6.5},
    itl_ms={"p50": 5.0, "p99": 9.0},
    tok_s=500.0,
    goodput=3.9,
    goodput_limits_ms={"ttft": 200.0},
    command="vllm bench serve",
)
FIDELITY = FidelityRow(
    setup="rowint8",
    text="book.txt",
    window=1024,
    dtype="float32",
    tokens=1000,
    perplexity=17.25,
    nll_difference=0.001,
    nll_difference_stderr=0.0005,
    kl_mean=0.0123,
    kl_median=0.01,
    kl_p99=0.1,
    kl_max=0.5,
    same_top1=0.975,
)
AGREEMENT = AgreementRow(setup="rowint8", dtype="float32", prompt="p", tokens=32, agreed=3, logprob_gap=0.0625)
QUALITY = QualityRow(
    engine="vllm", setup="rowint8", task="t", metric="acc", dtype="float32", questions=9, value=0.5, stderr=0.1
)


def write(folder, stem, *rows, ceilings=None):
    results = Results(environment=ENVIRONMENT, command=f"measure {stem}", rows=rows, ceilings=ceilings)
    write_results(folder / f"{stem}.json", results)


def section(text, title):
    """From a heading to the next one of its level or above."""
    level = title.split()[0]
    lines = text.split(f"\n{title}\n", 1)[1].splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith("#") and len(line.split()[0]) <= len(level)), None)
    return "\n".join(lines[:end])


def cells(text, *start):
    """The cells of the only table line that begins with `start`."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.splitlines()]
    (found,) = [line for line in lines if line[: len(start)] == list(start)]
    return found


def test_committed_documents_are_what_the_results_give():
    folder = ROOT / "results"
    wanted = documents(folder, read_folder(folder))
    names = {path.relative_to(ROOT).as_posix() for path in wanted}
    assert names >= {
        "README.md",
        "POSTMORTEM.md",
        "docs/engine.md",
        "docs/vllm.md",
        "results/REPORT.md",
        "results/h200.md",
    }
    stale = [str(path) for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `rowint8 report --mixed` and commit what it writes"


def test_documents_are_short_and_their_links_to_results_lead_somewhere():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in ("README.md", "POSTMORTEM.md")}
    lengths["REPORT.md"] = len((ROOT / "results" / "REPORT.md").read_text().splitlines())
    assert [
        name for name, most in (("README.md", 120), ("POSTMORTEM.md", 200), ("REPORT.md", 400)) if lengths[name] > most
    ] == []
    documents = [
        ROOT / "README.md",
        ROOT / "POSTMORTEM.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "results").glob("*.md"),
    ]
    dead = [
        f"{path.name}: {link}"
        for path in documents
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if not link.startswith("http") and not (path.parent / link).exists()
    ]
    assert dead == []


def test_what_is_not_measured_has_no_section_and_its_part_is_a_line(tmp_path):
    write(tmp_path, "agreement-cpu", AGREEMENT)
    found = read_folder(tmp_path)
    text = report(found)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Memory", "## Agreement of the two engines", "## Files"]
    assert "TBD" not in text
    assert "All files are of one commit." in text
    made = parts(found)
    assert made["kernels"] == "TBD: kernels-h200.json is not measured."
    assert {text.count("TBD") for text in made.values()} == {0, 1}


def test_files_of_different_code_are_refused_and_named(tmp_path):
    write(tmp_path, "agreement-cpu", AGREEMENT)
    write(tmp_path, "serve-h200", SERVE)
    refuse_mixed(read_folder(tmp_path))
    content = json.loads((tmp_path / "serve-h200.json").read_text())
    content["environment"] |= {"git_commit": "a commit that differs in words"}
    (tmp_path / "serve-h200.json").write_text(json.dumps(content))
    refuse_mixed(read_folder(tmp_path))
    del content["environment"]["code"]
    (tmp_path / "serve-h200.json").write_text(json.dumps(content))
    done = rowint8("report", tmp_path)
    assert done.returncode == 1
    assert f"code {ENVIRONMENT.code}: agreement-cpu; commit a commit tha: serve-h200" in done.stderr
    assert "or give --mixed" in done.stderr
    assert done.stderr.count("\n") == 1
    assert rowint8("report", "--mixed", tmp_path).returncode == 0


def test_new_files_are_picked_up_by_the_keys_of_their_rows(tmp_path):
    bf16 = replace(ENGINE, setup="bf16-graph", weights_gib=14.96, peak_mem_gib=15.5, ttft_ms=40.0, tpot_ms=10.0)
    bf16 = replace(bf16, tok_s=101 / 1.04, spread={"tpot_ms": 0.02})
    vllm = replace(ENGINE, engine="vllm", setup="rowint8", tpot_ms=4.8)
    write(
        tmp_path,
        "engine-h200",
        bf16,
        ENGINE,
        vllm,
        replace(ENGINE, output_tokens=1, tpot_ms=None, itl_ms=None, tok_s=50.0),
    )
    write(tmp_path, "serve-h100", SERVE)
    write(tmp_path, "fidelity-smollm2", FIDELITY, replace(FIDELITY, setup="only v_proj"))
    write(tmp_path, "quality-smollm2", QUALITY)
    write(tmp_path, "kernels-h100", KERNEL, ceilings=CEILINGS)
    found = read_folder(tmp_path)
    text = report(found)
    course = section(text, "## The same model and task in every setup")
    assert cells(course, "baseline int8-fused")[1:7] == ["1", "128", "101", "20.0", "194.2 ± 1.0", "9.25"]
    assert cells(course, "baseline int8-fused")[7] == "TPOT 5.00 ms, 2.00 x bf16-graph, weights 8.46 GiB"
    rates = section(text, "## The small engine, step by step, beside vLLM")
    assert cells(rates, "tg101, 1 at once")[1:] == ["100.0 ± 1.0", "200.0 (2.00)", "208.3"]
    assert cells(rates, "pp128, 1 at once")[1:] == ["", "6400 ± 32", ""]
    assert cells(rates, "weights GiB")[1:] == ["14.96", "8.46", "8.46"]
    served = section(text, "## Serving under load")
    assert cells(served, "4")[1:9] == ["vllm rowint8", "512", "128", "1", "31.5", "-", "62.5", "5.5"]
    page = card_pages(found)["cpu"]
    assert cells(section(page, "## fidelity-smollm2"), "rowint8")[1:] == ["17.250", "12.30", "97.5%"]
    assert "One kind of layer rounded alone, KL: v_proj 12.30." in page
    assert "\n| t (9) | acc | 0.5000 |" in parts(found)["quality-fp32"]
    least = (8.46 * GIB - 2 * 128256 * 4096) / 3.0e12 * 1000
    gap = cells(parts(found)["gaps"], "engine-h200", "baseline int8-fused")
    assert gap[2:] == ["5.00", f"{least:.2f}", f"{5.0 / least:.2f}", f"{5.0 / 4.8:.2f}"]
    assert "\nserve-h100: measure serve-h100\n" in section(text, "## Files")


def test_the_newest_of_the_files_that_may_hold_it_is_shown(tmp_path):
    for stem, date in (("vllm-h200", "2026-01-01"), ("vllm-0.33-h200", "2026-01-02"), ("vllm-other", "2026-01-03")):
        rows = (replace(VLLM, setup="bf16"), replace(VLLM, setup="fp8", tpot_ms=4.9))
        where = replace(ENVIRONMENT, date=date, git_commit=date)
        write_results(tmp_path / f"{stem}.json", Results(environment=where, command="rowint8 bench vllm", rows=rows))
    text = report(read_folder(tmp_path))
    assert "[vllm-0.33-h200](vllm-0.33-h200.json): Some GPU" in section(
        text, "## The same model and task in every setup"
    )
    assert "**The files are of 3 commits**" in text
    assert "random weights of Llama-3.1-8B's shape" in text
    assert parts(read_folder(tmp_path))["vllm-2"] == "TBD: vllm-h200x2.json is not measured.", "not another file's"


def test_a_demo_alone_is_the_table_that_begins_the_report(tmp_path):
    fields = {key: getattr(ENGINE, key) for key in Generation.__dataclass_fields__ if key != "kind"}
    write(tmp_path, "mine", GenerationRow(**fields))
    course = section(report(read_folder(tmp_path)), "## The same model and task in every setup")
    assert cells(course, "baseline int8-fused")[4:7] == ["20.0", "194.2", "9.25"]


def test_costs_stand_with_the_model_and_the_file_they_are_of(tmp_path):
    speed = [
        replace(ENGINE, engine="vllm", setup=name, tpot_ms=ms, tok_s=1000 / ms)
        for name, ms in (("bf16", 10.0), ("rowint8", 5.0))
    ]
    speed = [replace(row, output_tokens=128, ttft_ms=row.tpot_ms) for row in speed]
    load = [replace(SERVE, ttft_ms={"p50": 1.0, "p99": p99}) for p99 in (60.0, 70.0, 90.0)]
    rounded = [replace(FIDELITY, setup=name, kl_mean=kl) for name, kl in (("unquantized", 0.0), ("fp8-a8", 0.03))]
    for stem, rows in (("vllm-h200", speed), ("serve-h200", load), ("fidelity-a8-smollm2", rounded)):
        write(tmp_path, stem, *rows)
    text = parts(read_folder(tmp_path))["costs"]
    assert cells(text, "one user decodes, tok/s")[1:5] == ["100", "200", "-", "-"]
    assert cells(text, "p99 TTFT at 4 requests a second, ms")[1:5] == ["-", "70", "-", "-"]
    assert cells(text, "KL from the original, thousandths of a nat")[1:] == [
        *("0.0", "-", "-", "30.0"),
        "[SmolLM2-135M-Instruct](results/fidelity-a8-smollm2.json)",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(KERNEL, us={"rowint8": 30.0, "cublas_bf16": 90.0}), "rowint8 takes 30.0 us, less than the 39"),
        (replace(KERNEL, us={"rowint8": 50.0, "marlin": 37.0}), "marlin takes 37.0 us, less than the 39"),
        (replace(KERNEL, M=8192, us={"rowint8": 2000.0, "cublas_bf16": 2600.0}), "rowint8 takes 2000.0 us, less than"),
        (replace(KERNEL, us={"rowint8": 50.0, "cublas_bf16": 251.0}), "0.20 times cublas_bf16's time"),
        (replace(KERNEL, us={"rowint8": 500.0, "cublas_bf16": 90.0}), "5.56 times cublas_bf16's time"),
        (replace(KERNEL, us={"marlin": 50.0}), "us has no rowint8"),
        (replace(ENGINE, tpot_ms=6.0), r"TTFT \+ TPOT x \(tokens - 1\) is 620.0 ms, but .* took 520.0 ms"),
        (replace(ENGINE, ttft_ms=1.0, tpot_ms=4.0), "is 401.0 ms, but .* took 520.0 ms"),
        (replace(ENGINE, peak_mem_gib=8.0), "peak memory of 8.000 GiB is below the weights' 8.460"),
        (replace(ENGINE, weights_gib=20.0, peak_mem_gib=21.0), r"reading the weights at 4\.29 TB/s, above .* 3\.00"),
        (replace(SERVE, ttft_ms={"p50": 9.0, "p99": 8.0}), "TTFT: 9, 8 should not fall"),
        (replace(SERVE, goodput=9.0), "goodput 9.00/s x 128 tokens is more than 500 tok/s"),
        (replace(FIDELITY, kl_median=0.2), "KL: 0.2, 0.1, 0.5 should not fall"),
        (replace(AGREEMENT, agreed=33), "33 tokens agree of 32"),
        (replace(QUALITY, value=1.5), "acc is 1.5, outside 0 to 1"),
        (replace(QUALITY, difference=0.2), r"acc is 0.5, but the first setup's 0.5 and \+0.2"),
    ],
)
def test_what_cannot_be_stops_the_report(tmp_path, row, message):
    write(tmp_path, "kernels-h100", KERNEL, ceilings=CEILINGS)
    good = next(r for r in (KERNEL, ENGINE, SERVE, FIDELITY, AGREEMENT, QUALITY) if type(r) is type(row))
    write(tmp_path, "other", good, row, ceilings=CEILINGS if isinstance(row, KernelRow) else None)
    with pytest.raises(EvalError, match=message) as stopped:
        read_folder(tmp_path)
    assert str(stopped.value).startswith("other.json: rows.1: ")
    assert "\n" not in str(stopped.value)


def test_a_step_of_experts_may_leave_weights_unread(tmp_path):
    write(tmp_path, "kernels-h100", KERNEL, ceilings=CEILINGS)
    row = replace(ENGINE, weights_gib=20.0, peak_mem_gib=21.0)
    for config, accepted in (("qwen3-30b-a3b", True), ("mixtral-8x7b", True), ("llama-3.1-8b", False)):
        command = f"rowint8 bench vllm --config {config}"
        write_results(tmp_path / "vllm.json", Results(environment=ENVIRONMENT, command=command, rows=(row,)))
        with nullcontext() if accepted else pytest.raises(EvalError, match="reading the weights"):
            assert "vllm" in read_folder(tmp_path)


def test_backends_of_a_metric_stand_beside_one_another(tmp_path):
    rows = [replace(QUALITY, setup="unquantized", metric=metric) for metric in ("acc", "word_perplexity")]
    pair = dict(value=0.75, difference=0.25, difference_stderr=0.125)
    rows += [replace(rows[0], setup="rowint8", gained=3, lost=1, **pair), replace(rows[1], stderr=None, **pair)]
    write(tmp_path, "quality-suite", *rows)
    text = section(card_pages(read_folder(tmp_path))["cpu"], "## quality-suite")
    assert cells(text, "t (9)", "acc")[2:] == ["0.5000", "+0.2500 ± 0.1250 (+3 -1)"]
    assert cells(text, "t (9)", "word_perplexity")[2:] == ["0.5000", "+0.2500 ± 0.1250"]
    table = quality_table(rows)
    assert [line[2] for line in table.lines] == ["vllm", "vllm-rowint8", "vllm", "vllm"]
    assert table.lines[1][5:] == ["0.7500 ± 0.1000", "+0.2500 ± 0.1250", "3", "1"]


def test_weights_that_fit_the_cache_may_be_read_faster(tmp_path):
    small = replace(KERNEL, M=1, N=4096, K=4096, us={"rowint8": 4.0, "cublas_bf16": 8.0})
    write(tmp_path, "kernels-h100", small, ceilings=CEILINGS)
    assert read_folder(tmp_path)["kernels-h100"].rows == (small,)


def test_a_batch_may_end_later_than_its_mean_request(tmp_path):
    write(tmp_path, "vllm-h100", replace(ENGINE, batch=8, tok_s=8 * 101 / 0.9))
    assert len(read_folder(tmp_path)) == 1


def test_negative_times_and_unknown_keys_are_named(tmp_path):
    write(tmp_path, "engine-h100", ENGINE)
    document = json.loads((tmp_path / "engine-h100.json").read_text())
    for change, message in (({"ttft_ms": -1.0}, "greater than 0"), ({"colour": "red"}, "colour")):
        broken = {**document, "rows": [{**document["rows"][0], **change}]}
        (tmp_path / "engine-h100.json").write_text(json.dumps(broken))
        with pytest.raises(EvalError, match=rf"engine-h100\.json: rows\.0\..*{message}"):
            read_folder(tmp_path)


def test_the_table_of_fidelity_fits_80_columns():
    longest = replace(FIDELITY, setup="rowint8-a8+lm_head", nll_difference=-0.00123, kl_mean=0.00306, kl_p99=0.0195)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(fidelity_table([FIDELITY, longest]))
    (line,) = [line.split() for line in console.export_text().splitlines() if "lm_head" in line]
    assert line == ["rowint8-a8+lm_head", "17.2500", "-0.00123", "±", "0.00050", "0.00306", "0.0195", "97.50%"]


def test_our_own_parts_are_no_peers():
    swiglu = replace(
        KERNEL, op="swiglu", us={"rowint8": 50.0, "unfused": 51.0, "unfused_vllm": 49.0, "machete_vllm": 60}
    )
    assert best_peer(swiglu) == "machete_vllm"
    assert best_peer(replace(KERNEL, us={"rowint8": 50.0, "unfused": 51.0})) is None
    assert best_peer(KERNEL, ("cublas",)) == "cublas_bf16"


def test_compiled_sizes_with_the_same_kernels_share_a_line():
    made = Compilation(kernels=("triton_poi_0",), extern=("extern_kernels.mm",), log=())
    row = replace(KERNEL, us={"rowint8": 50.0, "compiled": 100.0}, compiler={"compiled": made})
    rows = (row, replace(row, M=32, us={"rowint8": 50.0, "compiled": 150.0}))
    text = compiler_table(Results(environment=ENVIRONMENT, command="c", rows=rows))
    wanted = ["linear", "compiled", "16, 32", "`triton_poi_0`, *extern_kernels.mm*", "2.00 to 3.00"]
    assert cells(text, "linear") == wanted


def test_arithmetic_of_bytes_is_what_the_engine_measured():
    smollm2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
    smollm2 |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    for row in read_results(ROOT / "results" / "demo-cpu.json").rows:
        form = "bf16" if row.setup.startswith("bf16") else "rowint8"
        assert weight_bytes(smollm2, form) == round(row.weights_gib * GIB)


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("rowint8 bench vllm --json a.json", "random weights of Llama-3.1-8B's shape"),
        (
            "rowint8 bench vllm --config qwen3-30b-a3b --layers 24 --json a",
            "random weights of Qwen3-30B-A3B's shape with 24 layers",
        ),
        ("rowint8 profile --config mixtral-8x7b", "random weights of Mixtral-8x7B's shape"),
        ("rowint8 quality --json a.json", "SmolLM2-135M-Instruct"),
        ("rowint8 bench engine --model models/smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
        ("rowint8 bench vllm --model=Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
    ],
)
def test_what_a_command_measures_is_read_from_it(command, model):
    assert model_of(command) == model


def test_fill_replaces_marked_parts_only():
    text = "a\n<!-- report:x -->\nold\n<!-- /report -->\nb\n<!-- report:y -->\n<!-- /report -->\n"
    once = fill(text, {"x": "new\n", "y": r"\1 | z"}, "README.md")
    assert once == ("a\n<!-- report:x -->\nnew\n<!-- /report -->\nb\n<!-- report:y -->\n\\1 | z\n<!-- /report -->\n")
    assert fill(once, {"x": "new\n", "y": r"\1 | z"}, "README.md") == once
    with pytest.raises(EvalError, match=r"README\.md asks for report:y; accepted are x"):
        fill(text, {"x": ""}, "README.md")
    with pytest.raises(EvalError, match="has no `<!-- /report -->`"):
        fill(text.removesuffix("<!-- /report -->\n"), {"x": "", "y": ""}, "README.md")


def test_bars_in_cells_stay_in_their_cell():
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"


def rowint8(*arguments):
    command = [console_script("rowint8"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_command_writes_the_report_its_plots_and_marked_parts(tmp_path):
    folder = tmp_path / "results"
    bf16 = replace(ENGINE, setup="bf16-graph")
    write(
        folder, "engine-h100", *(replace(row, batch=b, tok_s=b * row.tok_s) for b in (1, 8) for row in (bf16, ENGINE))
    )
    write(folder, "fidelity-smollm2", FIDELITY, replace(FIDELITY, setup="int8-group32", kl_mean=0.01))
    write(folder, "kernels-h200", KERNEL, replace(KERNEL, M=32), ceilings=CEILINGS)
    (tmp_path / "README.md").write_text("mine\n<!-- report:limits -->\n<!-- /report -->\n")
    done = rowint8("report", folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    names = {"engine-h100-batch.svg", "fidelity-smollm2-kl.svg"}
    assert {path.name for path in folder.iterdir()} - {"REPORT.md", "cpu.md"} == names | {
        f"{stem}.json" for stem in ("engine-h100", "fidelity-smollm2", "kernels-h200")
    }
    text = (folder / "REPORT.md").read_text()
    assert all(f"![{name}]({name})" in text for name in names)
    assert ">int8-group32</text>" in (folder / "fidelity-smollm2-kl.svg").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("mine\n<!-- report:limits -->\n| of the limit |")
    assert (
        cells(readme, "linear gate_up")[2] == "78%"
    )  # (28672 * 4096 + 2 * 28672 + 16 * 4096 * 2) bytes / 3 TB/s / 50 us


def test_a_full_disk_leaves_the_documents_whole(tmp_path):
    write(tmp_path / "results", "kernels-h200", KERNEL, ceilings=CEILINGS)
    (tmp_path / "results" / "REPORT.md").write_text("Written by `rowint8 report`\n" * 100)
    (tmp_path / "README.md").write_text("mine\n" * 1000 + "<!-- report:limits -->\n<!-- /report -->\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    script = f"ulimit -f 1; exec '{console_script('rowint8')}' report --no-plots '{tmp_path / 'results'}'"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"rowint8: cannot write {tmp_path}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["REPORT.md", "cpu.md", "link"])
def test_words_of_a_user_are_not_replaced(tmp_path, name):
    write(tmp_path / "results", "agreement-cpu", AGREEMENT)
    mine = tmp_path / "mine.md" if name == "link" else tmp_path / "results" / page(name)
    mine.write_text("my own words\n")
    if name == "link":
        (tmp_path / "results" / "REPORT.md").symlink_to(mine)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = rowint8("report", tmp_path / "results")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "is not of `rowint8 report`, which would replace it" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def page(name):
    return f"{page_of(ENVIRONMENT)}.md" if name == "cpu.md" else name


def test_a_document_that_is_a_link_stays_one(tmp_path):
    write(tmp_path / "results", "agreement-cpu", AGREEMENT)
    (tmp_path / "mine.md").write_text("mine\n<!-- report:limits -->\n<!-- /report -->\n")
    (tmp_path / "README.md").symlink_to("mine.md")
    assert rowint8("report", tmp_path / "results").returncode == 0
    assert (tmp_path / "README.md").is_symlink()
    assert "TBD: kernels-h200.json is not measured." in (tmp_path / "mine.md").read_text()


def test_the_documents_beside_a_folder_are_found_from_inside_it(tmp_path, monkeypatch):
    write(tmp_path / "results", "agreement-cpu", AGREEMENT)
    (tmp_path / "README.md").write_text("")
    monkeypatch.chdir(tmp_path / "results")
    wanted = documents(tmp_path / "results", read_folder(tmp_path / "results"))
    found = documents(Path(), read_folder(Path()))
    assert {path.resolve(): text for path, text in found.items()} == wanted


def test_a_document_that_is_no_text_is_one_line(tmp_path):
    write(tmp_path / "results", "agreement-cpu", AGREEMENT)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(EvalError, match=r"cannot read .*README\.md: it is not UTF-8"):
        documents(tmp_path / "results", read_folder(tmp_path / "results"))


def test_help_has_an_example():
    assert "Example: rowint8 report results" in rowint8("report", "--help").stdout


def test_plots_are_only_those_whose_data_exist(tmp_path):
    write(tmp_path, "vllm-h100", replace(ENGINE, engine="vllm", setup="bf16"))
    write(tmp_path, "agreement-cpu", AGREEMENT)
    assert pictures(read_folder(tmp_path)) == {}


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    done = rowint8("report", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"rowint8: {tmp_path} has no result files; ")
    write(tmp_path, "engine-h100", replace(ENGINE, tpot_ms=50.0))
    done = rowint8("report", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("rowint8: engine-h100.json: rows.0: TTFT + TPOT")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "REPORT.md").exists()
