"""The core that all products share: a tile of outputs by tokens, summed over the inputs in one order.

Rows of a weight are the left operand of the matrix units and tokens the right one, so that few tokens cost
little, and one token or thousands are summed up alike: steps of 16 inputs, first to last, into one float32
sum. Weights that are not dense are widened in registers, to the dtype of the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toptwo_kernels.cuda.support import is_interpreted

# The interpreter multiplies bfloat16 numbers as integers; float32 ones have the same products.
_WIDENED = tl.constexpr(is_interpreted())
_GROUP = tl.constexpr(32)  # inputs that share a scale, and that a block of words unfolds into at a time
_FP8_ROWS = tl.constexpr(128)
_FP8_BIAS = tl.constexpr(2.0**120)


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
    GROUPS: tl.constexpr = 8 if FORMAT == "int4" else 4
    at_K = tl.arange(0, _GROUP)
    x_TK = x_T[:, None] + at_K[None, :]
    num_blocks = tl.cdiv(cols, GROUPS * _GROUP)
    first_row = matrix.to(tl.int64) * rows
    words_OK = words + (first_row + rows_O)[:, None] * (num_blocks * _GROUP) + at_K[None, :]
    next_words_OK = words_OK + rows.to(tl.int64) * (num_blocks * _GROUP)
    scales_O = _find_scales(scales, matrix, num_blocks, rows_O, rows, FORMAT)
    next_scales_O = _find_scales(scales, matrix + 1, num_blocks, rows_O, rows, FORMAT)
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    next_sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in range(num_blocks):
        block_OK = tl.load(words_OK + block * _GROUP, eviction_policy="evict_first")
        here_O = _load_scales(scales_O, block, rows, FORMAT)
        if PAIRED:
            next_block_OK = tl.load(next_words_OK + block * _GROUP, eviction_policy="evict_first")
            next_here_O = _load_scales(next_scales_O, block, rows, FORMAT)
        for group in tl.static_range(GROUPS):
            start = (block * GROUPS + group) * _GROUP
            if EVEN:
                tokens_TK = tl.load(x_TK + start)
            else:
                tokens_TK = tl.load(x_TK + start, mask=(start + at_K < cols)[None, :], other=0.0)
            sums_OT = _dot(_widen(block_OK, here_O, group, FORMAT, tokens_TK.dtype), tokens_TK, sums_OT)
            if PAIRED:
                next_OK = _widen(next_block_OK, next_here_O, group, FORMAT, tokens_TK.dtype)
                next_sums_OT = _dot(next_OK, tokens_TK, next_sums_OT)
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
    elif FORMAT == "int8":
        scales_O = scales + matrix.to(tl.int64) * num_blocks * rows + rows_O
    else:
        scales_O = scales + matrix.to(tl.int64) * num_blocks * rows * 3 + rows_O
    return scales_O


@triton.jit
def _load_scales(scales_O: tl.tensor, block: tl.tensor, rows: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """What a block's groups need: three vectors, all the same unless int4."""
    if FORMAT == "fp8":
        first_O = tl.load(scales_O + block)
        second_O, zeros_O = first_O, first_O
    elif FORMAT == "int8":
        first_O = tl.load(scales_O + block * rows)
        second_O, zeros_O = first_O, first_O
    else:
        words_O = scales_O + block * rows * 3
        first_O, second_O = tl.load(words_O), tl.load(words_O + rows)
        zeros_O = tl.load(words_O + 2 * rows)
    return first_O, second_O, zeros_O


@triton.jit
def _widen(
    words_OK: tl.tensor, scales_O: tl.tensor, group: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """The weights [BLOCK_O, 32] of one group of a block.

    A quantised number becomes mantissa bits of a float whose exponent makes them whole steps; what that adds
    is taken off with the zero point. All of it is exact before it is rounded to DTYPE.
    """
    if FORMAT == "fp8":
        # Sign, exponent and mantissa go where float32 has them, whose exponent's bias is 127 instead of 7;
        # that is right for subnormal numbers too.
        bits_OK = ((words_OK << (24 - 8 * group)) >> 4) & -0x78100000
        weights_OK = bits_OK.to(tl.float32, bitcast=True) * (scales_O[0] * _FP8_BIAS)[:, None]
    else:
        BITS: tl.constexpr = 8 if FORMAT == "int8" else 4
        if FORMAT == "int8":
            scale_O = _half(scales_O[0], group)
            zero_O = tl.full(scale_O.shape, 128.0, tl.float32)
        else:
            scale_O = _half(scales_O[group // 4], group % 4)
            zero_O = ((scales_O[2] >> (8 * group)) & 0xFF).to(tl.float32) / 16
        # Two groups share a shift, one of which ends at the mantissa's top.
        PLACE: tl.constexpr = 23 - BITS * (2 - group % 2)
        RIGHT: tl.constexpr = group // 2 * 2 * BITS - (23 - 2 * BITS)
        STEP: tl.constexpr = 23 - PLACE  # the float's exponent
        shifted_OK = words_OK >> RIGHT if RIGHT > 0 else words_OK << -RIGHT
        base_O = (1 << STEP) + zero_O
        MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
        EXPONENT: tl.constexpr = (127 + STEP) << 23
        if tl.bfloat16 == DTYPE and not _WIDENED:
            weights_OK = _fuse_pairs(shifted_OK, scale_O, base_O * scale_O, MASK, EXPONENT)
        else:
            number_OK = ((shifted_OK & MASK) | EXPONENT).to(tl.float32, bitcast=True)
            weights_OK = (number_OK - base_O[:, None]) * scale_O[:, None]
    return weights_OK.to(DTYPE)


@triton.jit
def _fuse_pairs(
    words_OK: tl.tensor, scale_O: tl.tensor, offset_O: tl.tensor, MASK: tl.constexpr, EXPONENT: tl.constexpr
) -> tl.tensor:
    """number * scale - offset in bfloat16, where a number is a word's masked bits below an exponent.

    Two at a time in assembly: compilers take twice the instructions, and those are what takes time.
    """
    CODE: tl.constexpr = (
        f"{{.reg .b32 a, b, c; mov.b32 c, {EXPONENT};"
        f"lop3.b32 a, $1, {MASK}, c, 0xEA; lop3.b32 b, $2, {MASK}, c, 0xEA;"
        "fma.rn.f32 a, a, $3, $5; fma.rn.f32 b, b, $4, $6; cvt.rn.bf16x2.f32 $0, b, a;}"
    )
    scale_OK, _ = tl.broadcast(scale_O[:, None], words_OK)
    offset_OK, _ = tl.broadcast(-offset_O[:, None], words_OK)
    return tl.inline_asm_elementwise(
        CODE,
        "=r,r,r,f,f,f,f",
        [words_OK, scale_OK, offset_OK],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _half(words_O: tl.tensor, index: tl.constexpr) -> tl.tensor:
    """One of the four float16 numbers of 64-bit words, as float32."""
    bits_O = ((words_O >> (16 * index)) & 0xFFFF).to(tl.int16)
    return bits_O.to(tl.float16, bitcast=True).to(tl.float32)
