"""rowint8.eval.results.roofline: the least time of a kernel, and the best of the others."""

from dataclasses import replace

import pytest

from rowint8.eval.results.roofline import best_peer, limit_us
from rowint8.eval.results.schema import Ceilings, KernelRow

CEILINGS = Ceilings(read_tb_s=2.0, bf16_tflop_s=500.0)
LINEAR = KernelRow(
    op="linear",
    shape="gate_up",
    M=1,
    N=28672,
    K=4096,
    us=dict(rowint8=80.0, cublas_bf16=160.0, machete=100.0),
    spread=dict(rowint8=0.01, cublas_bf16=0.02, machete=0.035),
)
NORM = KernelRow(
    op="add_rms_norm",
    shape="h4096",
    M=1024,
    N=4096,
    K=4096,
    us=dict(rowint8=20.0, vllm=16.0),
    spread=dict(rowint8=0.0, vllm=0.0),
)


def test_limit_is_reading_or_computing():
    moved = 28672 * 4096 + 2 * 28672 + 2 * 4096
    assert limit_us(LINEAR, CEILINGS) == pytest.approx(moved / 2e6)
    many = replace(LINEAR, M=4096)
    assert limit_us(many, CEILINGS) == pytest.approx(2 * 4096 * 28672 * 4096 / 500e6)
    assert limit_us(NORM, CEILINGS) == pytest.approx(4 * 1024 * 4096 * 2 / 2e6)


def test_the_best_peer_is_the_fastest_that_is_not_ours():
    assert best_peer(LINEAR) == "machete"
    assert best_peer(replace(LINEAR, us=dict(rowint8=1.0, unfused=1.5, cublas_bf16=2.0))) == "cublas_bf16"
    assert best_peer(replace(LINEAR, us=dict(rowint8=1.0))) is None
