"""How INT8 values become wider ones, exactly: PTX for several values at once, as the compiler takes them one by one.

- fp32 holds 2^23 + (value + 128), put together from bytes; 2^23 + 128 comes off. Adding 128 flips the sign bit.
- fp16 holds 1024 + (value + 128) likewise; 1152 comes off.
- bf16 has seven bits: it holds 128 + the low seven of a value; 128 comes off, or 256 where the sign bit is set.

FOUR: values in the bytes of a register. PAIR: two in an int16, as one load of the Hopper kernel has them.
"""

from typing import Any

import triton.language as tl

FOUR_TO_FP32: Any = tl.constexpr(
    """{
        .reg .b32 v, w0, w1, w2, w3;
        xor.b32 v, $4, 0x80808080;
        prmt.b32 w0, v, 0x4B000000, 0x7440;
        prmt.b32 w1, v, 0x4B000000, 0x7441;
        prmt.b32 w2, v, 0x4B000000, 0x7442;
        prmt.b32 w3, v, 0x4B000000, 0x7443;
        add.rn.f32 $0, w0, 0fCB000080;
        add.rn.f32 $1, w1, 0fCB000080;
        add.rn.f32 $2, w2, 0fCB000080;
        add.rn.f32 $3, w3, 0fCB000080;
    }"""
)
FOUR_TO_FP16: Any = tl.constexpr(
    """{
        .reg .b32 v, offset;
        xor.b32 v, $2, 0x80808080;
        mov.b32 offset, 0x64806480;
        prmt.b32 $0, v, 0x6464, 0x4140;
        prmt.b32 $1, v, 0x6464, 0x4342;
        sub.rn.f16x2 $0, $0, offset;
        sub.rn.f16x2 $1, $1, offset;
    }"""
)
FOUR_TO_BF16: Any = tl.constexpr(
    """{
        .reg .b32 v, offset, one;
        mov.b32 one, 0x3f803f80;
        prmt.b32 v, $2, 0, 0x4140;
        lop3.b32 offset, v, 0x00800080, 0xC300C300, 0xea;
        lop3.b32 v, v, 0x007f007f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, v, one, offset;
        prmt.b32 v, $2, 0, 0x4342;
        lop3.b32 offset, v, 0x00800080, 0xC300C300, 0xea;
        lop3.b32 v, v, 0x007f007f, 0x43004300, 0xea;
        fma.rn.bf16x2 $1, v, one, offset;
    }"""
)
"""Before Hopper there is no sub.bf16x2."""
PAIR_TO_BF16: Any = tl.constexpr(
    """{
        .reg .b32 v, offset;
        cvt.u32.u16 v, $2;
        prmt.b32 v, v, 0, 0x4140;
        lop3.b32 offset, v, 0x00800080, 0x43004300, 0xea;
        lop3.b32 v, v, 0x007f007f, 0x43004300, 0xea;
        sub.rn.bf16x2 v, v, offset;
        mov.b32 {$0, $1}, v;
    }"""
)
PAIR_TO_FP16: Any = tl.constexpr(
    """{
        .reg .b32 v, offset;
        cvt.u32.u16 v, $2;
        prmt.b32 v, v, 0x6464, 0x4140;
        xor.b32 v, v, 0x00800080;
        mov.b32 offset, 0x64806480;
        sub.rn.f16x2 v, v, offset;
        mov.b32 {$0, $1}, v;
    }"""
)
