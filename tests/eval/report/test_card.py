"""`rowint8 card`: its block is one that docs/contributed.md takes, and a block that was changed is refused by name."""

from dataclasses import replace

import pytest

from rowint8.eval.errors import EvalError
from rowint8.eval.quantize.sizes import read_sizes
from rowint8.eval.report.card import card_block, contributed
from rowint8.eval.report.document import documents, read_folder
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, write_results
from tests.conftest import REPO
from tests.eval.cli.test_app import rowint8
from tests.eval.report.test_document import AGREEMENT, ENGINE, FIDELITY, QUALITY, SERVE


def results(*rows, **environment):
    where = replace(describe_environment(), device="Some GPU", **environment)
    return Results(environment=where, command="rowint8 bench --json mine.json", rows=rows)


def test_a_block_says_machine_model_and_rows_and_is_read_back_whole():
    found = {"mine.json": results(ENGINE), "s.json": results(SERVE), "q.json": results(QUALITY, QUALITY)}
    found["f.json"] = results(FIDELITY)
    block = card_block(read_sizes("llama-3.1-8b"), found)
    assert block.startswith("### Some GPU: llama-3.1-8b\n")
    assert "224 linear layers become INT8; all weights: 14.96 GiB in bf16, 8.46 in INT8." in block
    assert block.count("Random weights of the model's shape.") == 2
    assert (
        "| baseline int8-fused | 1 | 128 | 101 | 20.0 | 194.2 ± 1.0 | 9.25 | TPOT 5.00 ms, weights 8.46 GiB |" in block
    )
    assert contributed(f"# Title\n\n{block}", "c.md") == list(found.values())


def test_a_block_is_of_one_machine_and_of_rows_that_others_can_compare():
    sizes = read_sizes("llama-3.1-8b")
    other = {"a.json": results(ENGINE), "b.json": replace(results(ENGINE), environment=describe_environment())}
    with pytest.raises(EvalError, match=r"b\.json is of .*, a\.json of Some GPU; a block is of one"):
        card_block(sizes, other)
    with pytest.raises(EvalError, match=r"a\.json holds rows of kind agreement; give files of `rowint8 bench vllm`"):
        card_block(sizes, {"a.json": results(AGREEMENT)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (('"batch":1', '"batch":-1'), r"c\.md, block 1: rows\.0\.batch: .*greater than or equal to 1"),
        (('"batch":1', '"bach":1'), r"c\.md, block 1: rows\.0\.ba.*ch: "),
        (('"tpot_ms":5.0', '"tpot_ms":1.0'), r"c\.md, block 1: rows\.0: TTFT \+ TPOT"),
        (("```json", "```JSON"), r"c\.md begins 1 blocks of JSON, of which 0 are whole"),
        (("```json", "~~~json"), r"c\.md begins 1 blocks of JSON, of which 0 are whole"),
        (("```json", "  ```json"), r"c\.md begins 1 blocks of JSON, of which 0 are whole"),
        (("}\n```\n", "}\n"), r"c\.md begins 1 blocks of JSON, of which 0 are whole"),
    ],
)
def test_a_block_that_was_changed_is_refused_by_name(changed, message):
    block = card_block(read_sizes("llama-3.1-8b"), {"mine.json": results(ENGINE)})
    assert changed[0] in block
    with pytest.raises(EvalError, match=message):
        contributed(block.replace(*changed), "c.md")


def test_the_blocks_of_this_repository_are_right_and_the_report_checks_them(tmp_path):
    path = REPO / "docs" / "contributed.md"
    assert len(contributed(path.read_text(), path.name)) > 0
    write_results(tmp_path / "results" / "a.json", results(AGREEMENT))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "contributed.md").write_text("```json\n{}\n```\n")
    with pytest.raises(EvalError, match=r"docs/contributed\.md, block 1: environment: Field required"):
        documents(tmp_path / "results", read_folder(tmp_path / "results"))


def test_the_command_prints_a_block_and_one_line_of_what_is_wrong(tmp_path):
    write_results(tmp_path / "mine.json", results(ENGINE))
    done = rowint8("card", "tiny", str(tmp_path / "mine.json"))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "### Some GPU: tiny"), done.stderr
    assert contributed(done.stdout, "printed") == [
        results(ENGINE, date=contributed(done.stdout, "")[0].environment.date)
    ]
    done = rowint8("card", "tiny", str(tmp_path / "none.json"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot read" in done.stderr
