"""The core that all products share: a tile of outputs by tokens, summed over the inputs in one order.

Rows of a weight are the left operand of the matrix units and tokens the right one, so that few tokens cost
little, and one token or thousands are summed up alike: steps of 16 inputs, first to last, into one float32
sum. Weights that are not dense are widened in registers, to the dtype of the activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toptwo_kernels.cuda.packing import BLOCK_INPUTS
from toptwo_kernels.cuda.support import is_interpreted
from toptwo_kernels.cuda.widen import find_scales, load_scales, widen_part
from toptwo_kernels.ops import Matrix

# The interpreter multiplies bfloat16 numbers as integers; float32 ones have the same products.
_WIDENED = tl.constexpr(is_interpreted())
_GROUP = tl.constexpr(32)  # inputs that share a scale, and that a block of words unfolds into at a time
_MANY_ROWS, _MANY_MATRICES = 16384, 16  # outputs, or heads and experts, that need no slices
_LEAST_SLICE, _MOST_SLICES, _SLICE_UNIT = 1024, 4, 256


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


def slice_inputs(matrix: Matrix) -> int:
    """Inputs that are summed up by themselves, of a matrix whose outputs alone would occupy few warps.

    Slices are then added in order, by whoever has one or all of them. Dense weights are one slice: tiles of
    them are large, and arithmetic takes none of their time.
    """
    rows = matrix.rows * (matrix.num_matrices if matrix.num_matrices > _MANY_MATRICES else 1)
    if matrix.format not in BLOCK_INPUTS or rows > _MANY_ROWS:
        return matrix.cols
    slices = max(1, min(_MOST_SLICES, matrix.cols // _LEAST_SLICE))
    return -(-matrix.cols // (slices * _SLICE_UNIT)) * _SLICE_UNIT


@triton.jit
def multiply_slices(
    x_T: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    matrix_O: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    slice_id: tl.tensor,
    slice_cols: tl.tensor,
    SPLIT: tl.constexpr,
    FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Products [BLOCK_O, BLOCK_T] in float32 of rows with tokens: of one slice of their inputs if SPLIT, else
    of all.

    x_T: addresses of the tokens' first inputs, of which there are cols. matrix_O, rows_O: which matrix of the
    stack each row is in, and where. EVEN: cols is a multiple of BLOCK_K, or of the format's block.
    """
    if FORMAT == "int8" or FORMAT == "int4" or FORMAT == "fp8":
        sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
        start = slice_id * slice_cols if SPLIT else 0
        stop = start + slice_cols if SPLIT else cols
        for first in range(start, stop, slice_cols):
            sums_OT += _multiply_words(
                x_T, words, scales, matrix_O, rows_O, rows, cols, first, tl.minimum(first + slice_cols, cols),
                FORMAT, EVEN, BLOCK_O, BLOCK_T,
            )  # fmt: skip
    else:
        sums_OT = _multiply_dense(
            x_T, words, matrix_O.to(tl.int64) * rows + rows_O, cols, EVEN, BLOCK_O, BLOCK_T, BLOCK_K
        )
    return sums_OT


@triton.jit
def _multiply_dense(
    x_T: tl.tensor,
    weights: tl.tensor,
    rows_O: tl.tensor,
    cols: tl.tensor,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    POLICY: tl.constexpr = _policy(BLOCK_T)
    at_K = tl.arange(0, BLOCK_K)
    x_TK = x_T[:, None] + at_K[None, :]
    weights_OK = weights + rows_O[:, None] * cols + at_K[None, :]
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for start in range(0, cols, BLOCK_K):
        if EVEN:
            tokens_TK = tl.load(x_TK + start)
            block_OK = tl.load(weights_OK + start, eviction_policy=POLICY)
        else:
            inside_K = (start + at_K < cols)[None, :]
            tokens_TK = tl.load(x_TK + start, mask=inside_K, other=0.0)
            block_OK = tl.load(weights_OK + start, mask=inside_K, other=0.0, eviction_policy=POLICY)
        sums_OT = _dot(block_OK, tokens_TK, sums_OT)
    return sums_OT


@triton.jit
def _multiply_words(
    x_T: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    matrix_O: tl.tensor,
    rows_O: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tl.tensor:
    PARTS: tl.constexpr = 2 if FORMAT == "int4" else 1  # of a block of words, of four groups each
    PART: tl.constexpr = 4 * _GROUP
    BLOCK: tl.constexpr = PARTS * PART
    POLICY: tl.constexpr = _policy(BLOCK_T)
    at_K, at_G = tl.arange(0, PART), tl.arange(0, _GROUP)
    x_TK = x_T[:, None] + at_K[None, :]
    num_blocks = tl.cdiv(cols, BLOCK)
    row_words = (num_blocks * _GROUP).to(tl.int64)
    words_OG = words + ((matrix_O * rows + rows_O) * row_words)[:, None] + at_G[None, :]
    scales_O = find_scales(scales, matrix_O, num_blocks, rows_O, rows, FORMAT)
    sums_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in range(first // BLOCK, tl.cdiv(last, BLOCK)):
        block_OG = tl.load(words_OG + block * _GROUP, eviction_policy=POLICY)
        for part in tl.static_range(PARTS):
            start = (block * PARTS + part) * PART
            if EVEN:
                tokens_TK = tl.load(x_TK + start)
            else:
                tokens_TK = tl.load(x_TK + start, mask=(start + at_K < cols)[None, :], other=0.0)
            here_O = load_scales(scales_O, block, part, rows, FORMAT)
            weights_OK = widen_part(block_OG, here_O, part, FORMAT, tokens_TK.dtype)
            sums_OT = _dot(weights_OK, tokens_TK, sums_OT)
    return sums_OT


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
