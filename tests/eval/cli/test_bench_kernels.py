"""The command `rowint8 bench kernels`, as far as it goes without a GPU."""

from dataclasses import replace

import pytest
import torch

from rowint8.eval.results.files import read_results
from tests.eval.cli.test_app import rowint8
from tests.eval.results.test_roofline import CEILINGS, LINEAR


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_timing_without_a_gpu_is_one_line(tmp_path):
    done = rowint8("bench", "kernels", "--peers", "--json", tmp_path / "k.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rowint8: kernels are timed on a CUDA GPU; torch finds none here\n"
    assert not (tmp_path / "k.json").exists()


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    from rowint8.eval.cli import kernels

    monkeypatch.setattr("sys.argv", ["rowint8", "bench", "kernels"])
    path = tmp_path / "k.json"
    rows = []
    for m in (1, 2, 4):
        rows.append(replace(LINEAR, M=m))
        kernels._keep(path, rows, CEILINGS)
        assert [row.M for row in read_results(path).rows] == [row.M for row in rows]
    assert read_results(path).ceilings == CEILINGS
