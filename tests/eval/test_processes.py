"""rowint8.eval.processes: the environment of other programs. test_serve.py has how they are stopped."""

import os

import pytest

from rowint8.eval.processes import vllm_environment


@pytest.fixture(autouse=True)
def cpu_of_five_cores(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {8, 1, 2, 3, 4})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


@pytest.mark.parametrize(("ranks", "cores"), [(2, "1,2|3,4"), (4, "1|2|3|4"), (6, "1|2|3|4|8|1")])
def test_ranks_on_the_cpu_share_the_cores(ranks, cores):
    assert vllm_environment(ranks)["VLLM_CPU_OMP_THREADS_BIND"] == cores


def test_one_rank_takes_what_vllm_gives_it_and_the_users_word_stays(monkeypatch):
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert vllm_environment(2)["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
