"""rowint8.eval.results.roofline: the least time of a kernel, and the best of the others."""

from dataclasses import replace

import pytest

from rowint8.eval.results.roofline import best_peer, limit_us, misses, ratio
from rowint8.eval.results.schema import Ceilings, ChainRow, KernelRow, Ratio

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

CHAIN = ChainRow(
    chain="rowint8",
    kernels="ours",
    model="llama-3.1-8b",
    layers=32,
    M=128,
    us=4000.0,
    spread=0.01,
    ratio=Ratio(value=0.78, low=0.77, high=0.79),
    alone_us={"qkv": 17.0, "o": 12.0, "gate_up": 50.0, "down": 31.0, "norm": 4.0},
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


def test_a_miss_is_an_interval_above_what_is_even():
    sure, unsure = Ratio(value=1.05, low=1.03, high=1.06), Ratio(value=1.05, low=1.0, high=1.1)
    paired = dict(cublas_bf16=Ratio(value=0.5, low=0.4, high=0.6))
    for found, missed in ((sure, True), (unsure, False)):
        row = replace(LINEAR, paired=paired | dict(machete=found))
        assert ratio(row) == 1.05
        assert misses(row) is missed
        assert not misses(row, ("cublas",))
    assert not misses(LINEAR)
    assert misses(replace(LINEAR, us=dict(rowint8=80.0, machete=78.0))), "an older file is judged by the ratio"
    assert not misses(replace(LINEAR, us=dict(rowint8=80.0)))


def test_products_in_a_chain_are_what_the_norms_and_activations_leave():
    assert CHAIN.products_alone_us == 32 * (17 + 12 + 50 + 31)
    assert CHAIN.products_us == 4000 - 32 * 2 * 4
    alone = CHAIN.alone_us | {"activation": 5.0}
    assert replace(CHAIN, alone_us=alone).products_us == 4000 - 32 * (2 * 4 + 5)


def test_int8_tokens_are_half_as_many_bytes_and_multiply_twice_as_fast():
    moved = 28672 * 4096 + 2 * 28672
    rounded, rounding = (replace(LINEAR, op=f"{before}linear_int8") for before in ("", "quantize_tokens+"))
    assert limit_us(rounded, CEILINGS) == pytest.approx((moved + 4096) / 2e6)
    assert limit_us(replace(rounding, M=4096), CEILINGS) == pytest.approx(2 * 4096 * 28672 * 4096 / 1000e6)
    ours = dict(rowint8=30.0, rowint8_weight_only=20.0, cublas_bf16=40.0)
    assert best_peer(replace(rounded, us=ours)) == "cublas_bf16"
