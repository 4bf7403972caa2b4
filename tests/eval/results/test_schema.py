"""rowint8.eval.results: what is written is what is read, and what is wrong is refused with its place."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rowint8.eval.errors import EvalError
from rowint8.eval.results import environment
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Environment, Results, read_results, write_results
from rowint8.eval.results.schema import Compilation, GenerationRow, KernelRow

ENVIRONMENT = Environment(
    date="2026-01-02T03:04:05+00:00",
    device="Some CPU, 2 cores",
    driver=None,
    os="Linux",
    threads=2,
    python="3.11.7",
    rowint8="0.1.0",
    torch="2.13.0",
    triton=None,
    transformers="5.19.0",
    vllm=None,
    git_commit="abc",
    git_dirty=True,
)
ROW = GenerationRow(
    engine="baseline",
    setup="bf16-eager",
    batch=1,
    prompt_tokens=41,
    output_tokens=64,
    ttft_ms=12.5,
    itl_ms=3.25,
    tpot_ms=3.5,
    tok_s=270.0,
    weights_gib=0.25,
    peak_mem_gib=0.75,
)
RESULTS = Results(environment=ENVIRONMENT, command="rowint8 demo", rows=(ROW, replace(ROW, setup="int8")))

positive = st.floats(min_value=1e-300, max_value=1e15, allow_nan=False, allow_infinity=False)
counts = st.integers(min_value=1, max_value=10**15)
texts = st.text(st.characters(codec="utf-8"), min_size=1)


@given(
    st.builds(
        GenerationRow,
        engine=st.sampled_from(["baseline", "vllm", "transformers"]),
        setup=texts,
        batch=counts,
        prompt_tokens=counts,
        output_tokens=counts,
        ttft_ms=positive,
        itl_ms=positive,
        tpot_ms=positive,
        tok_s=positive,
        weights_gib=positive,
        peak_mem_gib=positive,
        command=st.none() | texts,
    )
)
def test_any_valid_row_survives_a_file(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("results") / "deep" / "r.json"
    results = Results(environment=ENVIRONMENT, command="c", rows=(row,))
    write_results(path, results)
    assert read_results(path) == results
    assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


def test_keys_are_those_that_later_measurements_rely_on(tmp_path):
    write_results(tmp_path / "r.json", RESULTS)
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written) == {"environment", "command", "rows"}
    keys = {"engine", "setup", "batch", "prompt_tokens", "output_tokens", "ttft_ms", "itl_ms", "tpot_ms", "tok_s"}
    assert set(written["rows"][0]) == keys | {"kind", "weights_gib", "peak_mem_gib", "command"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttft_ms": float("nan")}, "rows.1.ttft_ms: .*finite.*nan"),
        ({"ttft_ms": float("inf")}, "rows.1.ttft_ms: .*finite.*inf"),
        ({"ttft_ms": -1.5}, "rows.1.ttft_ms: .*greater than 0.*-1.5"),
        ({"tok_s": 0}, "rows.1.tok_s: .*greater than 0"),
        ({"ttft_ms": "12"}, "rows.1.ttft_ms: .*valid number.*'12'"),
        ({"ttft_ms": True}, "rows.1.ttft_ms: .*valid number"),
        ({"batch": 0}, "rows.1.batch: "),
        ({"batch": 1.5}, "rows.1.batch: .*integer"),
        ({"batch": 10**400}, "rows.1.batch: "),
        ({"prompt_tokens": 10**30}, "rows.1.prompt_tokens: .*less than"),
        ({"ttft_ms": 1e300}, "rows.1.ttft_ms: .*less than"),
        ({"engine": "llama.cpp"}, "rows.1.engine: .*'baseline', 'vllm' or 'transformers'.*llama.cpp"),
        ({"setup": ""}, "rows.1.setup: "),
        ({"itl_ms": None}, "itl_ms and tpot_ms may be null only where output_tokens is 1"),
        ({"unheard_of": 1}, "rows.1.unheard_of: "),
    ],
)
def test_wrong_values_are_refused_by_name(tmp_path, change, message):
    document = asdict(RESULTS)
    document["rows"][1].update(change)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    with pytest.raises(EvalError, match=message) as refused:
        read_results(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("key", ["environment", "command", "rows"])
def test_missing_keys_of_the_file_are_refused(tmp_path, key):
    document = asdict(RESULTS)
    del document[key]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(EvalError, match=key):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize(("part", "key"), [("environment", "torch"), ("rows", "ttft_ms")])
def test_missing_keys_inside_are_refused(tmp_path, part, key):
    document = asdict(RESULTS)
    del (document[part] if part == "environment" else document[part][0])[key]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(EvalError, match=f"{key}: Field required"):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "message"), [("", "JSON"), ('{"rows": [', "JSON"), ("[]", "the file"), ("\x00", "JSON")]
)
def test_files_that_are_no_results_are_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(EvalError, match=message):
        read_results(tmp_path / "r.json")


def test_absent_and_empty_results_are_refused(tmp_path):
    with pytest.raises(EvalError, match=r"cannot read .*No such file"):
        read_results(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.json")
    for special in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(EvalError, match="it is no regular file"):
            read_results(special)
    with pytest.raises(ValueError, match="rows is empty"):
        Results(environment=ENVIRONMENT, command="c", rows=())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("quality", r"rows\.0\.task: Field required"),
        ("engine", r"rows\.0\.repeats: Field required"),
        ("unheard-of", r"rows\.0: .*'unheard-of' .*'generation'.*'kernel'"),
        ("\n", r"rows\.0: .*'generation'"),
        (None, r"rows\.0: .*'kind'"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path, kind, message):
    document = asdict(RESULTS)
    document["rows"] = [{**row, "kind": kind} for row in document["rows"]]
    if kind is None:
        del document["rows"][0]["kind"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(EvalError, match=message) as refused:
        read_results(tmp_path / "r.json")
    assert "\n" not in str(refused.value)


def test_a_file_has_rows_of_one_kind(tmp_path):
    document = asdict(RESULTS)
    document["rows"] = [*document["rows"], asdict(KERNEL_ROW)]
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(EvalError, match="rows are of several kinds: GenerationRow, KernelRow"):
        read_results(tmp_path / "r.json")


KERNEL_ROW = KernelRow(
    op="add_rms_norm",
    shape="h64",
    M=1,
    N=64,
    K=64,
    us={"rowint8": 2.5, "vllm": 3.0},
    spread={"rowint8": 0.0, "vllm": 0.1},
)


def test_kernel_rows_survive_a_file_with_and_without_the_compiler(tmp_path):
    compiled = Compilation(kernels=("triton_red_fused_add_0",), extern=(), log=("fusing op0 with op1",))
    rows = (KERNEL_ROW, replace(KERNEL_ROW, dtype="float16", compiler={"compiled": compiled}))
    results = Results(environment=ENVIRONMENT, command="c", rows=rows)
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results
    plain, with_compiler = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert set(plain) == {"kind", "op", "shape", "dtype", "M", "N", "K", "us", "spread"}
    assert set(with_compiler) == set(plain) | {"compiler"}


def test_kernel_rows_without_a_dtype_are_bf16(tmp_path):
    document = asdict(Results(environment=ENVIRONMENT, command="c", rows=(KERNEL_ROW,)))
    del document["rows"][0]["dtype"]
    (tmp_path / "r.json").write_text(json.dumps(document))
    assert read_results(tmp_path / "r.json").rows == (KERNEL_ROW,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "conv"}, r"rows\.0\.op: .*'conv'"),
        ({"dtype": "float32"}, r"rows\.0\.dtype: "),
        ({"us": {"rowint8": 0.0}}, r"rows\.0\.us\.rowint8: .*greater than 0"),
    ],
)
def test_wrong_kernel_rows_are_refused(tmp_path, change, message):
    document = asdict(Results(environment=ENVIRONMENT, command="c", rows=(KERNEL_ROW,)))
    document["rows"][0].update(change)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(EvalError, match=message):
        read_results(tmp_path / "r.json")


def test_a_link_to_a_result_file_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "link.json").symlink_to("r.json")
    (tmp_path / "null.json").symlink_to("/dev/null")
    for name in ("link.json", "null.json"):
        write_results(tmp_path / name, RESULTS)
        assert (tmp_path / name).is_symlink()
    assert read_results(tmp_path / "r.json") == RESULTS
    assert not Path("/dev/null").is_file()


def test_unwritable_target_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot write"):
        write_results(tmp_path / "file" / "r.json", RESULTS)


def test_single_token_has_no_gaps():
    row = replace(ROW, output_tokens=1, itl_ms=None, tpot_ms=None)
    assert row.itl_ms is None


def test_rows_are_frozen():
    with pytest.raises(AttributeError):
        ROW.batch = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_environment_of_this_machine_is_valid():
    import torch

    found = describe_environment()
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert (found.driver is not None) == torch.cuda.is_available()
    assert (found.git_commit is None) == (found.git_dirty is None)


def checkout(folder, *names):
    """Makes a git checkout of empty files, all committed."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


@pytest.mark.parametrize(("changed", "dirty"), [("results/a.json", False), ("code.py", True)])
def test_results_that_are_being_measured_are_no_change_of_the_code(tmp_path, monkeypatch, changed, dirty):
    checkout(tmp_path, "results/a.json", "code.py", "environment.py")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert describe_environment().git_dirty is False
    (tmp_path / changed).write_text("changed")
    assert describe_environment().git_dirty is dirty


def test_the_stamp_names_the_commit_where_there_is_no_git(tmp_path, monkeypatch):
    checkout(tmp_path / "tree", "eval/results/environment.py", "kernels/a.py")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "tree/eval/results/environment.py"))
    commit = describe_environment().git_commit
    assert commit
    environment.write_stamp()
    shutil.copytree(tmp_path / "tree", tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "copy/eval/results/environment.py"))
    found = describe_environment()
    assert (found.git_commit, found.git_dirty) == (commit, False)
    (tmp_path / "copy/kernels/a.py").write_text("changed")
    found = describe_environment()
    assert (found.git_commit, found.git_dirty) == (commit, True), "the code is not what was stamped"
    with pytest.raises(EvalError, match="is in no git checkout of the code; stamp it where it is"):
        environment.write_stamp()
    (tmp_path / "copy/eval/results" / environment.STAMP).unlink()
    found = describe_environment()
    assert (found.git_commit, found.git_dirty) == (None, None)


def test_git_goes_before_the_stamp(tmp_path, monkeypatch):
    checkout(tmp_path, "eval/results/environment.py")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "eval/results/environment.py"))
    commit = describe_environment().git_commit
    (tmp_path / "eval/results" / environment.STAMP).write_text('{"commit": "old", "dirty": false, "digest": ""}')
    assert describe_environment().git_commit == commit


def test_words_do_not_change_the_hash_of_the_code_that_measures(tmp_path):
    first = {
        "kernels/a.py": '"""What it is."""\n\nx = 1\n"""What x is."""\n# why\n',
        "kernels/b.c": "int x;\n",
        "eval/report/c.py": "y = 1\n",
    }
    words = {"kernels/a.py": '"""Other\nwords."""\nx = 1\n', "eval/report/c.py": "y = 2\n"}
    code = {"kernels/a.py": "x = 2\n"}, {"kernels/b.c": "int y;\n"}, {"eval/d.py": "x = 1\n"}

    def hashed(name, *changes):
        for relative, text in {key: text for change in (first, *changes) for key, text in change.items()}.items():
            (tmp_path / name / relative).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / relative).write_text(text)
        return environment.code_hash(tmp_path / name)

    assert hashed("first") == hashed("words", words)
    assert len({hashed("first"), *(hashed(f"code{i}", change) for i, change in enumerate(code))}) == 4
