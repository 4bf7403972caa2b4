"""The norm kernel against the fp64 oracle: interpreted where there is no GPU, compiled where there is one.

Outputs are poisoned with NaN before every launch, shapes are awkward on purpose, inputs are fresh at every run.
"""

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs

from rowint8.kernels import ops, reference
from rowint8.kernels.add_rms_norm import add_rms_norm, norm_warps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# What fp32 may lose before the normalized value is rounded to the output's dtype, relative, in units of 2^-24. Under
# the root, which halves them: a square, at most 75 additions in a chain, the division (4) and eps. Then the root itself
# (3 by the manual of PTX) and a product.
FP32_ERROR = (81 / 2 + 3 + 1) * 2.0**-24

interpreted = pytest.param("cpu", marks=pytest.mark.skipif(not knobs.runtime.interpret, reason="needs the interpreter"))
compiled = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", [interpreted, compiled])
pytestmark = pytest.mark.usefixtures("poison_empty")


def case(m, h, dtype, device):
    x, residual = torch.randn(2, m, h, device=device).to(dtype)
    return x, residual, torch.randn(h, device=device).to(dtype)


def rounded(values, dtype):
    """`values` in dtype. Conversions round to nearest, but the interpreter's to bf16 cuts the lower bits off."""
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        values = (values.float().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def check(x, residual, weight, out):
    """The sum must be exact; the rest too, but where fp32's error decides how the normalized value is rounded."""
    normed, total = out
    assert normed.dtype == total.dtype == x.dtype
    assert torch.equal(total, rounded(x.float() + residual.float(), x.dtype))
    unit, _ = reference.add_rms_norm(total, torch.zeros_like(total), torch.ones_like(weight), EPS)
    ends = [rounded(unit * (1 + sign * FP32_ERROR), x.dtype) for sign in (-1, 1)]
    low, high = (rounded(end.float() * weight.float(), x.dtype) for end in ends)
    assert torch.all(torch.minimum(low, high) <= normed)
    assert torch.all(normed <= torch.maximum(low, high))


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 7, 576, 4096, 5120, 14336])
@pytest.mark.parametrize("m", [1, 3, 17])
def test_add_rms_norm(device, dtype, h, m):
    x, residual, weight = case(m, h, dtype, device)
    check(x, residual, weight, add_rms_norm(x, residual, weight, EPS))


@on_each_device
def test_the_order_of_rounding_shows(device):
    """What `check` accepts excludes a product in fp32 and a mean over the sum before it is rounded."""
    x, residual, weight = case(17, 4096, torch.float16, device)
    exact, total = reference.add_rms_norm(x, residual, weight, EPS)
    with pytest.raises(AssertionError):
        check(x, residual, weight, (exact.half(), total.half()))
    once, _ = reference.add_rms_norm(total.half(), torch.zeros_like(total), weight, EPS)
    with pytest.raises(AssertionError):
        check(x, residual, weight, (once.half(), total.half()))


@on_each_device
def test_rows_of_zeros_nan_and_infinity(device):
    x, residual, weight = case(9, 100, torch.float32, device)
    clean, _ = add_rms_norm(x, residual, weight, EPS)
    x[2], residual[2] = 0, 0
    x[5], x[7, 3] = float("nan"), float("inf")
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(normed[2], torch.zeros_like(weight))
    assert torch.equal(total[2], torch.zeros_like(weight))
    assert normed[5].isnan().all()
    assert normed[7, 3].isnan()
    others = [0, 1, 3, 4, 6, 8]
    assert torch.equal(normed[others], clean[others])


@on_each_device
def test_same_bits_on_every_run_and_among_any_rows(device):
    x, residual, weight = case(11, 576, torch.bfloat16, device)
    first, again = (add_rms_norm(x, residual, weight, EPS) for _ in range(2))
    alone = add_rms_norm(x[6:7], residual[6:7], weight, EPS)
    for one, other, row in zip(first, again, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[6:7], row)


@on_each_device
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(device, shape):
    x, residual, weight = case(*shape, torch.float32, device)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert normed.shape == total.shape == shape


@on_each_device
def test_an_address_off_sixteen_bytes(device):
    x, residual, weight = case(3, 128, torch.float16, device)
    off = [torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in (x, residual, weight)]
    assert all(t.data_ptr() % 16 for t in off)
    check(x, residual, weight, add_rms_norm(*off, EPS))


@given(h=st.integers(1, 65_536), itemsize=st.sampled_from([2, 4]))
def test_a_thread_has_work_and_not_too_much(h, itemsize):
    warps, block = norm_warps(h, itemsize), triton.next_power_of_2(h)
    assert warps in (1, 2, 4, 8, 16, 32)
    assert block // (32 * warps) <= 64, "more than a thread's registers hold"
    assert block * itemsize >= warps * 32 * 16 or warps == 1, "threads without an element"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h", [576, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("m", [1, 2, 16, 64, 300, 600, 2048, 8192])
def test_model_sized(dtype, h, m):
    x, residual, weight = case(m, h, dtype, "cuda")
    before = x.clone(), residual.clone(), weight.clone()
    check(x, residual, weight, ops.add_rms_norm(x, residual, weight, EPS))
    assert all(torch.equal(now, then) for now, then in zip((x, residual, weight), before, strict=True))


def chain(x, residual, weight, after_each):
    """Norms that each take what the one before returned."""
    for _ in range(20):
        x, residual = ops.add_rms_norm(x, residual, weight, EPS)
        after_each()
    return x, residual


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 1000])
def test_a_launch_ahead_of_time_waits_for_its_input(m):
    given = case(m, 4096, torch.bfloat16, "cuda")
    apart = chain(*given, torch.cuda.synchronize)
    together = chain(*given, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph_and_compiled():
    x, residual, weight = case(24, 4096, torch.bfloat16, "cuda")
    run = torch.compile(lambda *given: chain(*given, lambda: None), fullgraph=True)
    run(x, residual, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, residual, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(out, chain(x, residual, weight, lambda: None), strict=True))
