"""Codes of 4 and 8 bits to floats, in a few instructions, and in plain Triton.

The plain way takes a code out of its byte and converts it: a mask, a shift, an integer-to-float conversion,
for every weight. While an H100 reads a line of 128 bytes (3 TB/s), its 528 schedulers issue 38 instructions
of a warp (1.7 GHz). A line holds 256 codes of 4 bits, 8 for each thread of a warp: whoever spends 5
instructions on a code is no longer waiting for the memory, the memory is waiting for him.

The quick way never converts. A float is a mantissa behind an exponent; put a small integer in the lowest
bits of the mantissa of 128.0 and the number *is* 128 + code:

    bfloat16    0x4300 | code = 128 + code      7 bits of mantissa: codes to 127
    float16     0x6400 | code = 1024 + code     10 bits: codes to 1023
    float32     0x4B000000 | code = 2²³ + code

One subtraction of (128 + zero) leaves code − zero, exactly. `prmt` picks four bytes out of eight, so that one
instruction puts two codes between two exponents: four bytes of 4-bit codes become eight bfloat16 with a
shift, two masks and four `prmt`. Compiled for an H100 (Triton 3.7), a step of `quant_dot.py` has 2.8
instructions for each code with it, and 8.4 in plain Triton. 8-bit codes do not fit bfloat16's mantissa; they
take the way through float32, whose upper half is the bfloat16 (Kim et al. 2022, arXiv:2211.10017, and Frantar
et al. 2024, arXiv:2408.11743, do the same in CUDA).
"""

from __future__ import annotations

from llmcourse.kernels.language import INSTALLED, tl, triton

constexpr = tl.constexpr if INSTALLED else str

# Bytes b0 … b3 in $4; out: low nibbles of (b0, b1), (b2, b3), then high nibbles of the same.
_NIBBLES = """{{
.reg .b32 low, high;
and.b32 low, $4, 0x0f0f0f0f;
shr.b32 high, $4, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, {exponent}, 0x5140;
prmt.b32 $1, low, {exponent}, 0x5342;
prmt.b32 $2, high, {exponent}, 0x5140;
prmt.b32 $3, high, {exponent}, 0x5342;
}}"""
NIBBLES_BF16 = constexpr(_NIBBLES.format(exponent="0x43434343"))
NIBBLES_FP16 = constexpr(_NIBBLES.format(exponent="0x64646464"))
# Bytes b0 … b3 in $2; out: 1024 + (b0, b1), 1024 + (b2, b3).
BYTES_FP16 = constexpr("""{
prmt.b32 $0, $2, 0x64646464, 0x5140;
prmt.b32 $1, $2, 0x64646464, 0x5342;
}""")
# 2²³ + b, less (2²³ + 128): exact in float32; an integer of at most 8 bits lies in the upper half.
BYTES_BF16 = constexpr("""{
.reg .b32 a, b, c, d;
.reg .f32 fa, fb, fc, fd;
prmt.b32 a, $2, 0x4b000000, 0x7650;
prmt.b32 b, $2, 0x4b000000, 0x7651;
prmt.b32 c, $2, 0x4b000000, 0x7652;
prmt.b32 d, $2, 0x4b000000, 0x7653;
mov.b32 fa, a;
mov.b32 fb, b;
mov.b32 fc, c;
mov.b32 fd, d;
sub.f32 fa, fa, 0f4B000080;
sub.f32 fb, fb, 0f4B000080;
sub.f32 fc, fc, 0f4B000080;
sub.f32 fd, fd, 0f4B000080;
mov.b32 a, fa;
mov.b32 b, fb;
mov.b32 c, fc;
mov.b32 d, fd;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 $1, c, d, 0x7632;
}""")
# Sign, exponent and mantissa of e4m3 moved to where the wider format has them, whose exponent counts from
# another number: one product puts that right, also for subnormal numbers.
_BYTES_E4M3 = """{{
.reg .b32 a, b, c, d, factor, none;
mov.b32 factor, {factor};
mov.b32 none, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
and.b32 c, a, 0x7f007f00;
and.b32 d, b, 0x7f007f00;
shr.b32 c, c, {shift};
shr.b32 d, d, {shift};
lop3.b32 a, a, 0x80008000, c, 0xea;
lop3.b32 b, b, 0x80008000, d, 0xea;
fma.rn.{format} $0, a, factor, none;
fma.rn.{format} $1, b, factor, none;
}}"""
BYTES_E4M3_BF16 = constexpr(_BYTES_E4M3.format(factor="0x7b807b80", shift=4, format="bf16x2"))  # 2¹²⁰
BYTES_E4M3_FP16 = constexpr(_BYTES_E4M3.format(factor="0x5c005c00", shift=1, format="f16x2"))  # 2⁸


@triton.jit
def unpack_int4(packed, zero, into: tl.constexpr, QUICK: tl.constexpr):
    """(code − zero of the low nibbles, of the high nibbles) of uint8 `packed`, exact in into.

    zero    a number, or a tensor of into that `packed` can be combined with
    QUICK   by inline PTX; else in plain Triton, which the interpreter runs too
    """
    if QUICK and into == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_BF16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        return low - (zero + 128.0).to(into), high - (zero + 128.0).to(into)
    elif QUICK and into == tl.float16:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_FP16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        return low - (zero + 1024.0).to(into), high - (zero + 1024.0).to(into)
    else:
        return (packed & 15).to(into) - zero.to(into), (packed >> 4).to(into) - zero.to(into)


@triton.jit
def unpack_int8(packed, zero, into: tl.constexpr, QUICK: tl.constexpr):
    """code − zero of uint8 `packed`, exact in into (integers from −255 to 255). As `unpack_int4`."""
    if QUICK and into == tl.bfloat16:
        codes = tl.inline_asm_elementwise(
            BYTES_BF16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
        return codes - (zero - 128.0).to(into)
    elif QUICK and into == tl.float16:
        codes = tl.inline_asm_elementwise(
            BYTES_FP16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
        return codes - (zero + 1024.0).to(into)
    else:
        return packed.to(into) - zero.to(into)


@triton.jit
def unpack_e4m3(packed, into: tl.constexpr, QUICK: tl.constexpr):
    """The numbers in e4m3 that uint8 `packed` holds, exact in another format. Its NaN comes out as ±480."""
    if QUICK and into == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BYTES_E4M3_BF16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif QUICK and into == tl.float16:
        return tl.inline_asm_elementwise(
            BYTES_E4M3_FP16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        wide = packed.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(into)  # 2¹²⁰
