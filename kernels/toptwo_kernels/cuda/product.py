"""The core that all products share: a tile of outputs by tokens, summed over the inputs in one order.

Rows of a weight are the left operand of the matrix units and tokens the right one, so that few tokens cost
little, and one token or thousands are summed up alike: steps of 16 inputs, first to last, into one float32
sum. Weights that are not dense are widened in registers, to the dtype of the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.support import is_interpreted

# The interpreter multiplies bfloat16 numbers as integers; float32 ones have the same products.
_WIDENED = tl.constexpr(is_interpreted())
_GROUP = tl.constexpr(32)  # inputs that share a scale, and that a block of words unfolds into at a time
_FP8_ROWS = tl.constexpr(128)
_AHEAD = 16 << 20  # bytes asked for by a launch before it computes: a third of the L2 cache of large cards
_LEAST_AHEAD, _PARTS_AHEAD = 128, 64  # bytes of a row, and what they are a multiple of


def bytes_ahead(device: Device, words_XRC: Tensor, num_rows: int) -> int:
    """How much of each row's beginning `fetch_ahead` is to ask for when a launch reads num_rows rows once."""
    size = words_XRC.stride(1) * words_XRC.element_size()
    ahead = min(size, _AHEAD // num_rows) // _PARTS_AHEAD * _PARTS_AHEAD
    return ahead if device.pdl and size % 16 == 0 and ahead >= _LEAST_AHEAD else 0


@triton.jit
def order_tiles(num_blocks: tl.tensor, num_tiles: tl.tensor, GROUP_T: tl.constexpr) -> tl.tensor:
    """Which block of tokens and which tile of outputs this program computes.

    GROUP_T blocks of tokens meet one tile of weights after the other, so that both stay in the L2 cache.
    """
    program = tl.program_id(0)
    first = program // (GROUP_T * num_tiles) * GROUP_T
    size = tl.minimum(num_blocks - first, GROUP_T)
    within = program % (GROUP_T * num_tiles)
    return first + within % size, within // size


@triton.jit
def fetch_ahead(
    words: tl.tensor, matrix: tl.tensor, rows_O: tl.tensor, rows: tl.tensor, size: tl.tensor, ahead: tl.tensor
) -> None:
    """Ask for the first `ahead` bytes of a matrix's rows, to lie in the L2 cache when they are read.

    What runs in front of a product keeps memory less busy than a product does: weights come while it waits
    for its turn. Needs compute capability 9.0. size: of a row, in numbers. ahead: see `bytes_ahead`.
    """
    at_X = tl.arange(0, 4)
    part = ahead // 4
    rows_OX = (words + (matrix.to(tl.int64) * rows + rows_O) * size)[:, None].to(tl.int64) + (at_X * part)[
        None, :
    ]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [rows_OX, tl.zeros(rows_OX.shape, tl.int32) + part],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def multiply(
    x_T: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    matrix: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    FORMAT: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Products [BLOCK_O, BLOCK_T] in float32 of a matrix's rows with tokens, and of the next matrix's.

    x_T: addresses of the tokens' first inputs, of which there are cols. rows_O: rows of the matrix, none
    behind its last. PAIRED: whether the next matrix is wanted; else its sums are zeros. EVEN: cols is a
    multiple of BLOCK_K, or of the format's block.
    """
    if FORMAT == "int8" or FORMAT == "int4" or FORMAT == "fp8":
        sums_OT, next_sums_OT = _multiply_words(
            x_T, words, scales, matrix, rows_O, rows, cols, FORMAT, PAIRED, EVEN, BLOCK_O, BLOCK_T
        )
    else:
        sums_OT, next_sums_OT = _multiply_dense(
            x_T, words, matrix, rows_O, rows, cols, PAIRED, EVEN, BLOCK_O, BLOCK_T, BLOCK_K
        )
    return sums_OT, next_sums_OT


@triton.jit
def _multiply_dense(
    x_T: tl.tensor,
    words: tl.tensor,
    matrix: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    PAIRED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    at_K = tl.arange(0, BLOCK_K)
    x_TK = x_T[:, None] + at_K[None, :]
    first_row = matrix.to(tl.int64) * rows
    weight_OK = words + (first_row + rows_O)[:, None] * cols + at_K[None, :]
    next_OK = weight_OK + rows.to(tl.int64) * cols
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    next_sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for start in range(0, cols, BLOCK_K):
        if EVEN:
            tokens_TK = tl.load(x_TK + start)
            rows_OK = tl.load(weight_OK + start, eviction_policy="evict_first")
        else:
            inside_K = (start + at_K < cols)[None, :]
            tokens_TK = tl.load(x_TK + start, mask=inside_K, other=0.0)
            rows_OK = tl.load(weight_OK + start, mask=inside_K, other=0.0, eviction_policy="evict_first")
        sums_OT = _dot(rows_OK, tokens_TK, sums_OT)
        if PAIRED:
            if EVEN:
                next_rows_OK = tl.load(next_OK + start, eviction_policy="evict_first")
            else:
                next_rows_OK = tl.load(
                    next_OK + start, mask=inside_K, other=0.0, eviction_policy="evict_first"
                )
            next_sums_OT = _dot(next_rows_OK, tokens_TK, next_sums_OT)
    return sums_OT, next_sums_OT


@triton.jit
def _multiply_words(
    x_T: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    matrix: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    FORMAT: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tl.tensor:
    PARTS: tl.constexpr = 2 if FORMAT == "int4" else 1  # of a block of words, of four groups each
    PART: tl.constexpr = 4 * _GROUP
    at_K, at_G = tl.arange(0, PART), tl.arange(0, _GROUP)
    x_TK = x_T[:, None] + at_K[None, :]
    num_blocks = tl.cdiv(cols, PARTS * PART)
    first_row = matrix.to(tl.int64) * rows
    words_OG = words + (first_row + rows_O)[:, None] * (num_blocks * _GROUP) + at_G[None, :]
    next_words_OG = words_OG + rows.to(tl.int64) * (num_blocks * _GROUP)
    scales_O = _find_scales(scales, matrix, num_blocks, rows_O, rows, FORMAT)
    next_scales_O = _find_scales(scales, matrix + 1, num_blocks, rows_O, rows, FORMAT)
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    next_sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in range(num_blocks):
        block_OG = tl.load(words_OG + block * _GROUP, eviction_policy="evict_first")
        if PAIRED:
            next_block_OG = tl.load(next_words_OG + block * _GROUP, eviction_policy="evict_first")
        for part in tl.static_range(PARTS):
            start = (block * PARTS + part) * PART
            if EVEN:
                tokens_TK = tl.load(x_TK + start)
            else:
                tokens_TK = tl.load(x_TK + start, mask=(start + at_K < cols)[None, :], other=0.0)
            here_O = _load_scales(scales_O, block, part, rows, FORMAT)
            weights_OK = _widen_part(block_OG, here_O, part, FORMAT, tokens_TK.dtype)
            sums_OT = _dot(weights_OK, tokens_TK, sums_OT)
            if PAIRED:
                next_here_O = _load_scales(next_scales_O, block, part, rows, FORMAT)
                next_weights_OK = _widen_part(next_block_OG, next_here_O, part, FORMAT, tokens_TK.dtype)
                next_sums_OT = _dot(next_weights_OK, tokens_TK, next_sums_OT)
    return sums_OT, next_sums_OT


@triton.jit
def _dot(rows_OK: tl.tensor, tokens_TK: tl.tensor, sums_OT: tl.tensor) -> tl.tensor:
    tokens_TK = tokens_TK.to(rows_OK.dtype)
    if _WIDENED:
        rows_OK = rows_OK.to(tl.float32)
        tokens_TK = tokens_TK.to(tl.float32)
    return tl.dot(rows_OK, tl.trans(tokens_TK), sums_OT, input_precision="ieee")


@triton.jit
def _find_scales(
    scales: tl.tensor,
    matrix: tl.tensor,
    num_blocks: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """Addresses of what the rows' first block needs, as `packing` lays it out."""
    if FORMAT == "fp8":
        scales_O = scales + (matrix * tl.cdiv(rows, _FP8_ROWS) + rows_O // _FP8_ROWS) * num_blocks
    else:
        WORDS: tl.constexpr = 1 if FORMAT == "int8" else 4
        scales_O = scales + matrix.to(tl.int64) * num_blocks * WORDS * rows + rows_O
    return scales_O


@triton.jit
def _load_scales(
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
def _widen_part(
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
    if tl.bfloat16 == DTYPE and not _WIDENED:
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
    if _WIDENED:
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
    """The weights of a group in bfloat16, two at a time: instructions are what takes time.

    A byte of both words is put into each half of one, twice. An integer becomes mantissa bits of 128 + q in
    magnitude, and the 128 are taken off by the fused addition, or before it.
    """
    BYTE: tl.constexpr = group // 2 if FORMAT == "int4" else group
    TAKE: tl.constexpr = f"prmt.b32 p, $1, $2, {BYTE * 0x11 + (4 + BYTE) * 0x1100};"
    SHIFT: tl.constexpr = "shr.b32 p, p, 4;" if FORMAT == "int4" and group % 2 else ""
    if FORMAT == "int8":
        CODE: tl.constexpr = (
            "mov.b32 c, 0x43004300; lop3.b32 a, p, 0x807F807F, c, 0xEA;"
            "lop3.b32 b, p, 0x80008000, $5, 0x6A; fma.rn.bf16x2 $0, a, $3, b;"
        )
    elif FORMAT == "int4":
        CODE: tl.constexpr = (
            "mov.b32 c, 0x43004300; lop3.b32 a, p, 0x000F000F, c, 0xEA; mov.b32 b, 0xC300C300;"
            "mov.b32 c, 0x3F803F80; fma.rn.bf16x2 a, a, c, b; fma.rn.bf16x2 $0, a, $3, $5;"
        )
    else:
        CODE: tl.constexpr = (
            "shr.b32 a, p, 4; and.b32 a, a, 0x07F007F0; lop3.b32 a, p, 0x80008000, a, 0xEA;"
            "mul.rn.bf16x2 $0, a, $3;"
        )
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
