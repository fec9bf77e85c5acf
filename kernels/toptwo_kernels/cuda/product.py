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
from toptwo_kernels.cuda.widen import find_scales, load_scales, widen_part

# The interpreter multiplies bfloat16 numbers as integers; float32 ones have the same products.
_WIDENED = tl.constexpr(is_interpreted())
_GROUP = tl.constexpr(32)  # inputs that share a scale, and that a block of words unfolds into at a time
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
    POLICY: tl.constexpr = _policy(BLOCK_T)
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
            rows_OK = tl.load(weight_OK + start, eviction_policy=POLICY)
        else:
            inside_K = (start + at_K < cols)[None, :]
            tokens_TK = tl.load(x_TK + start, mask=inside_K, other=0.0)
            rows_OK = tl.load(weight_OK + start, mask=inside_K, other=0.0, eviction_policy=POLICY)
        sums_OT = _dot(rows_OK, tokens_TK, sums_OT)
        if PAIRED:
            if EVEN:
                next_rows_OK = tl.load(next_OK + start, eviction_policy=POLICY)
            else:
                next_rows_OK = tl.load(next_OK + start, mask=inside_K, other=0.0, eviction_policy=POLICY)
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
    POLICY: tl.constexpr = _policy(BLOCK_T)
    at_K, at_G = tl.arange(0, PART), tl.arange(0, _GROUP)
    x_TK = x_T[:, None] + at_K[None, :]
    num_blocks = tl.cdiv(cols, PARTS * PART)
    first_row = matrix.to(tl.int64) * rows
    words_OG = words + (first_row + rows_O)[:, None] * (num_blocks * _GROUP) + at_G[None, :]
    next_words_OG = words_OG + rows.to(tl.int64) * (num_blocks * _GROUP)
    scales_O = find_scales(scales, matrix, num_blocks, rows_O, rows, FORMAT)
    next_scales_O = find_scales(scales, matrix + 1, num_blocks, rows_O, rows, FORMAT)
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    next_sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in range(num_blocks):
        block_OG = tl.load(words_OG + block * _GROUP, eviction_policy=POLICY)
        if PAIRED:
            next_block_OG = tl.load(next_words_OG + block * _GROUP, eviction_policy=POLICY)
        for part in tl.static_range(PARTS):
            start = (block * PARTS + part) * PART
            if EVEN:
                tokens_TK = tl.load(x_TK + start)
            else:
                tokens_TK = tl.load(x_TK + start, mask=(start + at_K < cols)[None, :], other=0.0)
            here_O = load_scales(scales_O, block, part, rows, FORMAT)
            weights_OK = widen_part(block_OG, here_O, part, FORMAT, tokens_TK.dtype)
            sums_OT = _dot(weights_OK, tokens_TK, sums_OT)
            if PAIRED:
                next_here_O = load_scales(next_scales_O, block, part, rows, FORMAT)
                next_weights_OK = widen_part(next_block_OG, next_here_O, part, FORMAT, tokens_TK.dtype)
                next_sums_OT = _dot(next_weights_OK, tokens_TK, next_sums_OT)
    return sums_OT, next_sums_OT


@triton.constexpr_function
def _policy(block_tokens: int) -> str:
    """Weights that many tokens meet are read again for the next block of them."""
    return "evict_first" if block_tokens <= 64 else ""


@triton.jit
def _dot(rows_OK: tl.tensor, tokens_TK: tl.tensor, sums_OT: tl.tensor) -> tl.tensor:
    tokens_TK = tokens_TK.to(rows_OK.dtype)
    if _WIDENED:
        rows_OK = rows_OK.to(tl.float32)
        tokens_TK = tokens_TK.to(tl.float32)
    return tl.dot(rows_OK, tl.trans(tokens_TK), sums_OT, input_precision="ieee")
