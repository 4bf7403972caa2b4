"""docs/capstone.ipynb runs as it is committed, and what it measured fills the table."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pydantic import TypeAdapter

from rowint8.eval.markdown import TBD
from rowint8.eval.results.files import Results, read_results
from rowint8.eval.results.schema import GenerationRow

NOTEBOOK = Path(__file__).parent.parent / "docs" / "capstone.ipynb"
LAST_CELL = "import json; print(json.dumps([quantized.nbytes, gate.nbytes, float(steps.max()), relative_error]))"


def tables(notebook) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory, smollm2):
    """The notebook after its run, and the folder that it wrote."""
    notebook, out = nbformat.read(NOTEBOOK, as_version=4), tmp_path_factory.mktemp("capstone")
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_CELL))
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPSTONE_OUT", str(out))
        client.execute()
    return notebook, out


def test_it_is_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_a_matrix_takes_half_of_its_bytes(executed):
    notebook, _ = executed
    int8, bf16, largest_error, relative_error = json.loads(notebook.cells[-1].outputs[0].text)
    assert int8 == 1536 * 576 + 2 * 1536
    assert bf16 == 2 * 1536 * 576
    assert 0.49 < largest_error < 0.501
    assert 0.001 < relative_error < 0.02


def test_the_engines_rows_are_complete(executed):
    rows = read_results(executed[1] / "results" / "demo-cpu.json").rows
    assert [row.setup for row in rows] == ["bf16-eager", "bf16-compile", "int8-eager", "int8-fused-eager"]
    assert all(row.tpot_ms is not None and row.output_tokens == 16 for row in rows)
    assert rows[0].weights_gib == rows[1].weights_gib > 1.6 * rows[2].weights_gib
    assert rows[2].weights_gib == rows[3].weights_gib


def test_int8_moves_the_model_a_little(executed):
    plain, int8 = read_results(executed[1] / "results" / "fidelity-smollm2.json").rows
    assert (plain.setup, plain.kl_mean, int8.setup) == ("unquantized", 0.0, "rowint8")
    assert 1e-4 < int8.kl_mean < 0.02
    assert int8.tokens == 2 * 127


def test_both_models_answer_the_same_questions(executed):
    rows = read_results(executed[1] / "results" / "quality-smollm2.json").rows
    assert {(row.metric, row.setup) for row in rows} == {
        (metric, setup) for metric in ("acc", "acc_norm", "logprob") for setup in ("unquantized", "rowint8")
    }
    assert all(row.questions == 10 for row in rows)
    assert [row.setup for row in rows if row.difference is not None] == ["rowint8"] * 3
    assert all(row.value > 0.5 for row in rows if row.metric == "acc")


def test_the_table_is_first_empty_and_then_full(executed):
    notebook, out = executed
    *_, empty, full = tables(notebook)
    assert empty.count(TBD) == 3 * 7
    assert TBD not in full
    assert full.count("| baseline ") == 4
    assert full.strip() in (out / "results" / "REPORT.md").read_text()
    schema = json.loads((out / "schema.json").read_text())
    assert schema == TypeAdapter(Results[GenerationRow]).json_schema()
