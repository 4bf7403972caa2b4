# type: ignore  # Gluon's own types do not describe device code
"""What the Hopper kernel does with the sums of a tile: scale and bias, or SwiGLU, and the store. Device code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rowint8.kernels.shared_device_code import silu_times


@gluon.jit
def factors_of(scale, bias, row, N, ROWS: gl.constexpr, FUSED: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr):
    """Scale and bias of a consumer's rows, read before the tile is multiplied: nobody waits for them after it."""
    n = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    if FUSED:  # eight gate rows and their eight up rows in turn
        i = row // 2 + n // 16 * 8 + n % 8
        rows, mask = i + n // 8 % 2 * (N // 2), i < N // 2
    else:
        rows, mask = row + n, row + n < N
    factor = gl.load(scale + rows, mask=mask, other=0.0).to(gl.float32)
    offset = gl.zeros_like(factor)
    if HAS_BIAS:
        offset = gl.load(bias + rows, mask=mask, other=0.0).to(gl.float32)
    return factor, offset


@gluon.jit
def _swiglu(acc):
    """[R, BM] with eight gate rows and their eight up rows in turn -> silu(gate) * up [R / 2, BM]."""
    ROWS: gl.constexpr = acc.shape[0]
    gate, up = acc.reshape([ROWS // 16, 2, 8, acc.shape[1]]).permute((0, 2, 3, 1)).split()
    return silu_times(gate, up).reshape([ROWS // 2, acc.shape[1]])


@gluon.jit
def finish(acc, factor, offset, token_scale, out, row, token, new, M, N, FUSED: gl.constexpr):
    """Stores a part of a tile [R, BM], which begins at a row and a token; tokens before `new` are stored already."""
    acc = acc.to(gl.float32) * factor[:, None]
    if token_scale is not None:
        tokens = token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        of_token = gl.load(token_scale + tokens, mask=tokens < M, other=0.0)[None, :]
    if FUSED:
        if token_scale is not None:
            acc *= of_token
        _store(_swiglu(acc), out, row // 2, token, new, M, N // 2)
    else:
        if token_scale is not None:
            acc = gl.fma(acc, of_token + gl.zeros_like(acc), offset[:, None] + gl.zeros_like(acc))
        else:
            acc += offset[:, None]
        _store(acc, out, row, token, new, M, N)


@gluon.jit
def _store(acc, out, row, token, new, M, N):
    """Writes a block of out^T from the token `new` on, eight neighbouring outputs of a token per thread."""
    R: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [R // 8, 32 // (R // 8)], [1, 4], [0, 1])
    block = gl.convert_layout(acc.to(out.dtype.element_ty), LAYOUT)
    rows = row + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    tokens = token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    mask = (rows < N)[:, None] & ((tokens >= new) & (tokens < M))[None, :]
    gl.store(out + tokens.to(gl.int64)[None, :] * N + rows[:, None], block, mask=mask)
