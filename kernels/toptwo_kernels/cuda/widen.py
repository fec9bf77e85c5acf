"""Quantised weights as matrix units take them: from words and scales (`packing`) to numbers, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from toptwo_kernels.cuda.support import is_interpreted

_INTERPRETED = tl.constexpr(is_interpreted())
_FP8_ROWS = tl.constexpr(128)

# From bytes p twice in each half, the scale $3 and the offset $5 to two bfloat16 numbers. An integer becomes
# mantissa bits of 128 + q in magnitude, and the 128 are taken off by the fused addition, or before it.
_INT8_CODE = tl.constexpr(
    "mov.b32 c, 0x43004300; lop3.b32 a, p, 0x807F807F, c, 0xEA;"
    "lop3.b32 b, p, 0x80008000, $5, 0x6A; fma.rn.bf16x2 $0, a, $3, b;"
)
_INT4_CODE = tl.constexpr(
    "mov.b32 c, 0x43004300; lop3.b32 a, p, 0x000F000F, c, 0xEA; mov.b32 b, 0xC300C300;"
    "mov.b32 c, 0x3F803F80; fma.rn.bf16x2 a, a, c, b; fma.rn.bf16x2 $0, a, $3, $5;"
)
_FP8_CODE = tl.constexpr(
    "shr.b32 a, p, 4; and.b32 a, a, 0x07F007F0; lop3.b32 a, p, 0x80008000, a, 0xEA;"
    "mov.b32 b, 0x80008000; fma.rn.bf16x2 $0, a, $3, b;"  # cards before 9.0 have no product alone
)


@triton.jit
def find_scales(
    scales: tl.tensor,
    matrix_O: tl.tensor,
    num_blocks: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """Addresses of what the rows' first block needs, as `packing` lays it out."""
    if FORMAT == "fp8":
        scales_O = scales + (matrix_O * tl.cdiv(rows, _FP8_ROWS) + rows_O // _FP8_ROWS) * num_blocks
    else:
        WORDS: tl.constexpr = 1 if FORMAT == "int8" else 4
        scales_O = scales + matrix_O.to(tl.int64) * (num_blocks * WORDS * rows) + rows_O
    return scales_O


@triton.jit
def load_scales(
    scales_O: tl.tensor, block: tl.tensor, part: tl.constexpr, rows: tl.tensor, FORMAT: tl.constexpr
) -> tl.tensor:
    """What four groups need: two vectors, the same unless int4."""
    if FORMAT == "fp8":
        first_O = tl.load(scales_O + block)
        second_O = first_O
    elif FORMAT == "int8":
        first_O = tl.load(scales_O + block * rows)
        second_O = first_O
    else:
        words_O = scales_O + (block * 4 + part * 2) * rows
        first_O, second_O = tl.load(words_O), tl.load(words_O + rows)
    return first_O, second_O


@triton.jit
def widen_part(
    words_OG: tl.tensor, scales_O: tl.tensor, part: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """The weights [BLOCK_O, 128] of four groups of a block."""
    first_OG = _widen(words_OG, scales_O, part, 0, FORMAT, DTYPE)
    second_OG = _widen(words_OG, scales_O, part, 1, FORMAT, DTYPE)
    third_OG = _widen(words_OG, scales_O, part, 2, FORMAT, DTYPE)
    fourth_OG = _widen(words_OG, scales_O, part, 3, FORMAT, DTYPE)
    return _lay_side_by_side(_lay_side_by_side(first_OG, second_OG), _lay_side_by_side(third_OG, fourth_OG))


@triton.jit
def _lay_side_by_side(left_OK: tl.tensor, right_OK: tl.tensor) -> tl.tensor:
    both = tl.permute(tl.join(left_OK, right_OK), (0, 2, 1))
    return tl.reshape(both, (left_OK.shape[0], 2 * left_OK.shape[1]))


@triton.jit
def _widen(
    words_OG: tl.tensor,
    scales_O: tl.tensor,
    part: tl.constexpr,
    group: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """The weights [BLOCK_O, 32] of one group of a part, rounded once."""
    if FORMAT == "fp8":
        scale_O, offset_O = scales_O[0], scales_O[0]
    else:
        scale_O, offset_O = _unfold_scale(scales_O, group, FORMAT)
    if tl.bfloat16 == DTYPE and not _INTERPRETED:
        weights_OG = _widen_pairs(words_OG, scale_O, offset_O, 4 * part + group, FORMAT)
    else:
        scale_OG = _upper_half(scale_O)[:, None]
        if FORMAT == "fp8":
            # Sign, exponent and mantissa go where float32 has them, whose exponent's bias is 127 instead of
            # 7; that is right for subnormal numbers too.
            bits_OG = ((words_OG << (24 - 8 * group)) >> 4) & -0x78100000
            weights_OG = bits_OG.to(tl.float32, bitcast=True) * scale_OG
        elif FORMAT == "int8":
            byte_OG = (words_OG >> (8 * group)) & 0xFF
            number_OG = tl.where(byte_OG < 128, byte_OG, 128 - byte_OG)
            weights_OG = number_OG.to(tl.float32) * scale_OG
        else:
            number_OG = (words_OG >> (4 * (4 * part + group))) & 0xF
            weights_OG = number_OG.to(tl.float32) * scale_OG + _upper_half(offset_O)[:, None]
    return weights_OG.to(DTYPE)


@triton.jit
def _unfold_scale(scales_O: tl.tensor, group: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """A group's scale, and what is added behind it: the number twice in 32 bits. Of int8, -128 scales."""
    if FORMAT == "int8":
        scale_O = _repeat_half((scales_O[0] >> (32 * (group // 2))).to(tl.int32), group % 2)
        # Times -128 is seven more in the exponent, and the other sign.
        offset_O = (scale_O + 0x03800380) ^ -0x7FFF8000
    else:
        word_O = (scales_O[group // 2] >> (32 * (group % 2))).to(tl.int32)
        scale_O, offset_O = _repeat_half(word_O, 0), _repeat_half(word_O, 1)
    return scale_O, offset_O


@triton.jit
def _repeat_half(words_O: tl.tensor, half: tl.constexpr) -> tl.tensor:
    """Words with one of their halves in both."""
    if _INTERPRETED:
        bits_O = (words_O >> (16 * half)) & 0xFFFF
        repeated_O = bits_O | (bits_O << 16)
    else:
        CODE: tl.constexpr = "prmt.b32 $0, $1, 0, 0x3232;" if half else "prmt.b32 $0, $1, 0, 0x1010;"
        repeated_O = tl.inline_asm_elementwise(CODE, "=r,r", [words_O], dtype=tl.int32, is_pure=True, pack=1)
    return repeated_O


@triton.jit
def _upper_half(words_O: tl.tensor) -> tl.tensor:
    """The bfloat16 number in the upper half of words, as float32."""
    return (words_O & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _widen_pairs(
    words_OG: tl.tensor,
    scale_O: tl.tensor,
    offset_O: tl.tensor,
    group: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """The weights of a group in bfloat16, two at a time: instructions are what takes time."""
    BYTE: tl.constexpr = group // 2 if FORMAT == "int4" else group
    TAKE: tl.constexpr = f"prmt.b32 p, $1, $2, {BYTE * 0x11 + (4 + BYTE) * 0x1100};"
    SHIFT: tl.constexpr = "shr.b32 p, p, 4;" if FORMAT == "int4" and group % 2 else ""
    CODE: tl.constexpr = _INT8_CODE if FORMAT == "int8" else (_INT4_CODE if FORMAT == "int4" else _FP8_CODE)
    scale_OG, _ = tl.broadcast(scale_O[:, None], words_OG)
    offset_OG, _ = tl.broadcast(offset_O[:, None], words_OG)
    return tl.inline_asm_elementwise(
        "{.reg .b32 p, a, b, c;" + TAKE + SHIFT + CODE + "}",
        "=r,r,r,r,r,r,r",
        [words_OG, scale_OG, offset_OG],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
