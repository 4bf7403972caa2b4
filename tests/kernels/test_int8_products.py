"""Products of INT8 tokens against int64 sums, and tokens rounded on a GPU against `activations`: bit for bit.

The Triton kernel is interpreted where there is no GPU. Outputs are poisoned with NaN before every launch.
"""

import pytest
import torch
from triton import knobs

from rowint8.kernels import activations, ops
from rowint8.kernels.add_rms_norm import add_rms_norm
from rowint8.kernels.dispatch import choose, run_int8
from rowint8.kernels.int8_tokens import add_rms_norm_int8, quantize_tokens
from rowint8.kernels.tiles.card import card_of
from rowint8.kernels.tiles.types import INT8_HOPPER_TILES, TritonTile

pytestmark = pytest.mark.usefixtures("poison_empty")
interpreted = pytest.param("cpu", marks=pytest.mark.skipif(not knobs.runtime.interpret, reason="needs the interpreter"))
compiled = pytest.param("cuda", marks=pytest.mark.gpu)
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and card_of(torch.device("cuda")).hopper_processors), reason="needs a Hopper GPU"
)
TRITON = TritonTile(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=2, group=2)


def case(m: int, n: int, k: int, device: str):
    tokens = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    token_scale = torch.rand(m, device=device) / 100
    if m > 1:
        token_scale[m // 2] = float("nan")
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return tokens, token_scale, values, (torch.rand(n, device=device) / 100).half()


def expected(tokens, token_scale, values, scale, bias):
    """In the order of the definition. In fp64 the sum is exact, and so is the product before the bias is added."""
    scaled = (tokens.double() @ values.double().T).float() * scale.float()
    if bias is None:
        return token_scale[:, None] * scaled
    return (token_scale.double()[:, None] * scaled.double() + bias.double()).float()


def check(m: int, n: int, k: int, device: str, bias: bool, dtype: torch.dtype, tile=None):
    given = case(m, n, k, device)
    b = torch.randn(n, device=device).to(dtype) if bias else None
    out, exact = run_int8("linear_int8", *given, b, dtype, tile), expected(*given, b)
    # The interpreter truncates to bf16, and has no fused multiply-add.
    if knobs.runtime.interpret:
        close = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(out.float(), exact, rtol=close, atol=1e-5, equal_nan=True)
    else:
        assert torch.equal(out.nan_to_num(), exact.to(dtype).nan_to_num())
        assert torch.equal(out.isnan(), exact.isnan())
        alone = run_int8("linear_int8", given[0][-1:], given[1][-1:], *given[2:], b, dtype)
        assert torch.equal(out[-1:], alone)


def check_swiglu(m: int, n: int, k: int, device: str, dtype: torch.dtype, tile=None):
    given = case(m, n, k, device)
    out = run_int8("swiglu_int8", *given, None, dtype, tile)
    gate, up = expected(*given, None).double().chunk(2, dim=-1)
    close = 2e-6 if dtype == torch.float32 else 2.0**-8 + 2e-6
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(gate) * up, rtol=close, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", [interpreted, compiled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 34, 64), (33, 70, 131)])
def test_the_triton_kernel_sums_exactly(device, dtype, bias, shape):
    check(*shape, device, bias, dtype, TRITON)
    check_swiglu(*shape, device, torch.float32, TRITON)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", INT8_HOPPER_TILES, ids=lambda tile: str(tile.sizes))
def test_the_hopper_kernel_sums_exactly(tile):
    for n, k in ((16, 16), (336, 1040), (1296, 4112)):
        for m in (1, tile.block_m, tile.width - 1, tile.width, 2 * tile.width + 3):
            check(m, n, k, "cuda", m % 2 == 0, torch.bfloat16, tile)
            check_swiglu(m, n, k, "cuda", torch.bfloat16, tile)


@pytest.mark.gpu
@needs_hopper
def test_a_token_has_the_same_bits_alone_and_among_others():
    values, scale = case(1, 6144, 4096, "cuda")[2:]
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    tokens, token_scale = ops.quantize_tokens(x, 256)
    many = ops.linear_int8(tokens, token_scale, values, scale, None, torch.bfloat16)
    for count in (1, 2, 17, 65, 129):
        few, few_scale = ops.quantize_tokens(x[:count], 256)
        assert torch.equal(ops.linear_int8(few, few_scale, values, scale, None, torch.bfloat16), many[:count])


@pytest.mark.gpu
@needs_hopper
def test_tokens_that_tma_cannot_read_take_the_triton_kernel():
    tokens, _, values, _ = case(65, 96, 4104, "cuda")
    assert isinstance(choose("linear_int8", tokens, values), TritonTile)
    check(65, 96, 4104, "cuda", True, torch.bfloat16)


@pytest.mark.gpu
@needs_hopper
def test_outputs_in_fp32_take_the_triton_kernel():
    tokens, _, values, _ = case(65, 96, 4096, "cuda")
    assert isinstance(choose("linear_int8", tokens, values, dtype=torch.float32), TritonTile)
    check(65, 96, 4096, "cuda", True, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "block"), [(4096, 256), (14336, 256), (576, 64), (1001, 1), (48, 16), (32, 32), (7, 1)])
def test_tokens_are_rounded_as_defined(dtype, k, block):
    x = torch.randn(130, k, device="cuda").to(dtype) * 10
    x[1], x[2, k // 2], x[3, 0] = 0, float("inf"), float("nan")
    x[4] *= 1e-32 if dtype != torch.float16 else 1e-3
    tokens, token_scale = quantize_tokens(x, block)
    wanted, wanted_scale = activations.quantize_tokens(x.cpu(), block)
    assert torch.equal(tokens.cpu(), wanted)
    torch.testing.assert_close(token_scale.cpu(), wanted_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "block"), [(4096, 256), (576, 64), (1001, 1)])
def test_the_norm_hands_out_what_it_would_round(h, block):
    """Up to a sum in another order, which seldom moves a normed number to the next one."""
    x, residual = (torch.randn(130, h, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(h, device="cuda", dtype=torch.bfloat16)
    tokens, token_scale, total = add_rms_norm_int8(x, residual, weight, 1e-5, block)
    normed, wanted_total = add_rms_norm(x, residual, weight, 1e-5)
    wanted, wanted_scale = quantize_tokens(normed, block)
    assert torch.equal(total, wanted_total)
    torch.testing.assert_close(token_scale, wanted_scale, rtol=2**-7, atol=0)
    moved = (tokens.int() - wanted.int()).abs()
    assert moved.max() <= 2
    assert (moved > 0).float().mean() < 0.01
