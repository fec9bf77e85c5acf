"""Attention over a paged context, split by split: what attention over heads and over latents share.

Rows of a tile are queries times the heads that read one KV head. They walk the context in tiles of keys with
an online softmax, whose sums begin anew at each split of `plan.SPLIT` tokens; splits are then joined in
order. A decode step spreads splits over the card and joins them in a second kernel, any other step joins them
as it goes; both do the same operations in the same order, on tiles of the same width, so that a token gets
the same bits from either. No contraction is left to the compiler, which might choose differently in each.

Scores are in units of log 2. A score of -inf is a token that is not seen.
"""

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.support import is_interpreted

_LOG2_E = tl.constexpr(log2(e))
# The interpreter multiplies bfloat16 numbers as integers; float32 ones have the same products.
_WIDENED = tl.constexpr(is_interpreted())


@triton.jit
def as_operand(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x as tl.dot takes it, rounded to dtype."""
    return x.to(dtype).to(tl.float32) if _WIDENED else x.to(dtype)


@triton.jit
def begin_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The softmax over nothing, as `join` takes it."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    return m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def join(
    m: tl.tensor, total: tl.tensor, acc: tl.tensor, m_next: tl.tensor, total_next: tl.tensor,
    acc_next: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Two softmaxes as one: largest scores m [X], sums of weights [X] and of weighted values [X, V]."""
    m_both = tl.maximum(m, m_next)
    # Nothing seen on either side: exp2(-inf - 0) is 0, where -inf - -inf would not be a number.
    origin = tl.where(m_both == float("-inf"), 0.0, m_both)
    part, part_next = tl.exp2(m - origin), tl.exp2(m_next - origin)
    total = tl.fma(total, part, total_next * part_next)
    acc = tl.fma(acc, tl.broadcast_to(part[:, None], acc.shape), acc_next * part_next[:, None])
    return m_both, total, acc


@triton.jit
def finish(
    m: tl.tensor, total: tl.tensor, acc: tl.tensor, sinks_ptr: tl.tensor, heads: tl.tensor,
    is_head: tl.tensor,
    HAS_SINKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The weighted mean of values [X, V], zeros where nothing was seen. A sink has a score and no value."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_head, other=float("-inf")).to(tl.float32)
        weight = tl.where(sink == float("-inf"), 0.0, 1.0)
        m, total, acc = join(m, total, acc, sink * _LOG2_E, weight, tl.zeros_like(acc))
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def load_query(
    q_ptr: tl.tensor, is_row: tl.tensor,
    KEY: tl.constexpr, REST: tl.constexpr, KEY_PAD: tl.constexpr, REST_PAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The first KEY numbers of queries at q_ptr [X], and the REST behind them."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    at = tl.arange(0, KEY_PAD)
    q = tl.load(q_ptr[:, None] + at, mask=is_row[:, None] & (at < KEY), other=0.0)
    q = as_operand(q, dtype)
    if REST > 0:
        rest = tl.arange(0, REST_PAD)
        q_rest = tl.load(q_ptr[:, None] + KEY + rest, mask=is_row[:, None] & (rest < REST), other=0.0)
        q_rest = as_operand(q_rest, dtype)
    else:
        q_rest = q
    return q, q_rest


@triton.jit
def attend_split(
    q: tl.tensor, q_rest: tl.tensor, seen: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    table_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, column: tl.tensor, scale: tl.tensor,
    soft_cap: tl.tensor,
    DTYPE: tl.constexpr, KEY: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, KEY_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What ROWS queries find among the tokens [start, end) of a context: (m, total, acc [ROWS, COLUMNS]).

    seen: how many tokens of the context each query may see, 0 for no query.
    table_ptr: the context's blocks. keys_ptr, values_ptr: of the KV head, in block 0.
    column: which of a token's VALUE numbers is the first to be summed up.
    """
    m, total, acc = begin_sums(ROWS, COLUMNS)
    at_key, at_rest, at_value = tl.arange(0, KEY_PAD), tl.arange(0, REST_PAD), tl.arange(0, COLUMNS)
    for first in tl.range(start, end, BLOCK_L):
        at = first + tl.arange(0, BLOCK_L)
        block = tl.load(table_ptr + at // BLOCK_SIZE, mask=at < end, other=0)
        token = block.to(tl.int64) * BLOCK_STRIDE + (at % BLOCK_SIZE) * (KEY + REST)
        # What is not loaded is 0: memory behind a context may hold anything, and 0 * NaN is NaN.
        is_there = (at < end)[:, None]
        k = tl.load(keys_ptr + token[:, None] + at_key, mask=is_there & (at_key < KEY), other=0.0)
        if REST > 0 and COLUMNS == KEY_PAD:
            v = k  # all columns of a latent vector, which is key and value
        else:
            v_mask = is_there & (column + at_value < VALUE)
            v = tl.load(values_ptr + token[:, None] + column + at_value, mask=v_mask, other=0.0)
        s = tl.dot(q, tl.trans(as_operand(k, DTYPE)), input_precision="ieee")
        if REST > 0:
            r = tl.load(
                keys_ptr + token[:, None] + KEY + at_rest, mask=is_there & (at_rest < REST), other=0.0
            )
            s = tl.dot(q_rest, tl.trans(as_operand(r, DTYPE)), s, input_precision="ieee")
        s = s * scale
        if HAS_CAP:
            small = tl.exp2(-tl.abs(s))
            bent = soft_cap * ((1.0 - small) / (1.0 + small))
            s = tl.where(s < 0.0, -bent, bent)
        visible = at < seen[:, None]
        if WINDOW > 0:
            visible = visible & (at >= seen[:, None] - WINDOW)
        s = tl.where(visible, s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(m_next == float("-inf"), 0.0, m_next)
        p, shrink = tl.exp2(s - origin[:, None]), tl.exp2(m - origin)
        total = tl.fma(total, shrink, tl.sum(p, 1))
        p = as_operand(p, DTYPE)
        acc = tl.dot(p, as_operand(v, DTYPE), acc * shrink[:, None], input_precision="ieee")
        m = m_next
    return m, total, acc


@triton.jit(do_not_specialize=["num_rows", "table_stride"])
def decode_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, m_ptr: tl.tensor, total_ptr: tl.tensor,
    acc_ptr: tl.tensor, item_rows_ptr: tl.tensor, item_splits_ptr: tl.tensor, item_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor, tables_ptr: tl.tensor, num_rows: tl.tensor, table_stride: tl.tensor,
    scale: tl.tensor, soft_cap: tl.tensor,
    Q_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    SPLIT: tl.constexpr, KEY: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, KEY_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """m and total [I, N], acc [I, N, VALUE] of all items of rows with one query each.

    Grid: any number of programs that share the items; the groups of HEADS query heads that read one KV head;
    parts of COLUMNS of the values.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // parts
    in_group = (tl.program_id(1) % parts) * HEADS + tl.arange(0, ROWS)
    is_head = (tl.arange(0, ROWS) < HEADS) & (in_group < GROUP)
    heads = kv_head * GROUP + in_group
    column = tl.program_id(2) * COLUMNS
    at_value = column + tl.arange(0, COLUMNS)
    base = kv_head.to(tl.int64) * (BLOCK_SIZE * (KEY + REST))
    for item in tl.range(tl.program_id(0), tl.load(item_starts_ptr + num_rows), tl.num_programs(0)):
        row = tl.load(item_rows_ptr + item).to(tl.int64)
        start = tl.load(item_splits_ptr + item) * SPLIT
        context = tl.load(context_lens_ptr + row)
        end = tl.minimum(start + SPLIT, context)
        if WINDOW > 0:
            start = tl.maximum(start, (context - WINDOW) // BLOCK_L * BLOCK_L)
        queries_ptr = q_ptr + row * Q_STRIDE + heads * (KEY + REST)
        q, q_rest = load_query(queries_ptr, is_head, KEY, REST, KEY_PAD, REST_PAD)
        seen = tl.where(is_head, context, 0)
        m, total, acc = attend_split(
            q, q_rest, seen, keys_ptr + base, values_ptr + base, tables_ptr + row * table_stride,
            start, end, column, scale, soft_cap,
            DTYPE, KEY, REST, VALUE, KEY_PAD, REST_PAD, COLUMNS, ROWS,
            BLOCK_L, BLOCK_SIZE, BLOCK_STRIDE, WINDOW, HAS_CAP,
        )  # fmt: skip
        place = item * NUM_HEADS + heads.to(tl.int64)
        tl.store(m_ptr + place, m, mask=is_head & (column == 0))
        tl.store(total_ptr + place, total, mask=is_head & (column == 0))
        tl.store(acc_ptr + place[:, None] * VALUE + at_value, acc, mask=is_head[:, None] & (at_value < VALUE))


@triton.jit
def join_kernel(
    m_ptr: tl.tensor, total_ptr: tl.tensor, acc_ptr: tl.tensor, item_starts_ptr: tl.tensor,
    sinks_ptr: tl.tensor, out_ptr: tl.tensor,
    NUM_HEADS: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, HEADS: tl.constexpr,
    HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out [R, N, VALUE] of each row's items. Grid: rows, parts of HEADS heads."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < NUM_HEADS
    at_value = tl.arange(0, VALUE_PAD)
    mask = is_head[:, None] & (at_value < VALUE)
    m, total, acc = begin_sums(HEADS, VALUE_PAD)
    for item in tl.range(tl.load(item_starts_ptr + row), tl.load(item_starts_ptr + row + 1), num_stages=4):
        place = item * NUM_HEADS + heads.to(tl.int64)
        m_next = tl.load(m_ptr + place, mask=is_head, other=float("-inf"))
        total_next = tl.load(total_ptr + place, mask=is_head, other=0.0)
        acc_next = tl.load(acc_ptr + place[:, None] * VALUE + at_value, mask=mask, other=0.0)
        m, total, acc = join(m, total, acc, m_next, total_next, acc_next)
    out = finish(m, total, acc, sinks_ptr, heads, is_head, HAS_SINKS)
    place = row.to(tl.int64) * NUM_HEADS + heads
    tl.store(out_ptr + place[:, None] * VALUE + at_value, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride"])
def prompt_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, out_ptr: tl.tensor, sinks_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor, tile_queries_ptr: tl.tensor, query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor, tables_ptr: tl.tensor, table_stride: tl.tensor, scale: tl.tensor,
    soft_cap: tl.tensor,
    Q_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, QUERY_TILE: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr,
    KEY: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, KEY_PAD: tl.constexpr,
    REST_PAD: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, N, VALUE] of rows with any number of queries.

    A program has QUERIES queries, which are several of the plan's tiles or a part of one.
    Grid: tiles and their parts; groups of heads and columns as in `decode_kernel`.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    parts_of_tile: tl.constexpr = (QUERY_TILE + QUERIES - 1) // QUERIES
    tile = tl.program_id(0) // parts_of_tile
    row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    first = tl.load(tile_queries_ptr + tile) + (tl.program_id(0) % parts_of_tile) * QUERIES
    query_start = tl.load(query_starts_ptr + row)
    num_queries = tl.load(query_starts_ptr + row + 1) - query_start
    if (first % QUERIES != 0) | (first >= num_queries):
        return
    context = tl.load(context_lens_ptr + row)
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // parts
    in_group = (tl.program_id(1) % parts) * HEADS + tl.arange(0, ROWS) % HEADS
    heads = kv_head * GROUP + in_group
    query = first + tl.arange(0, ROWS) // HEADS
    is_row = (in_group < GROUP) & (query < num_queries)
    before = context - num_queries  # tokens of the context in front of the row's first query
    seen = tl.where(is_row, before + query + 1, 0)
    end = tl.minimum(context, before + first + QUERIES)
    column = tl.program_id(2) * COLUMNS
    base = kv_head.to(tl.int64) * (BLOCK_SIZE * (KEY + REST))
    token = (query_start + query).to(tl.int64)
    queries_ptr = q_ptr + token * Q_STRIDE + heads * (KEY + REST)
    q, q_rest = load_query(queries_ptr, is_row, KEY, REST, KEY_PAD, REST_PAD)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, (before + first + 1 - WINDOW) // BLOCK_L * BLOCK_L)
    m, total, acc = begin_sums(ROWS, COLUMNS)
    for split in tl.range(begin // SPLIT * SPLIT, end, SPLIT):
        m_next, total_next, acc_next = attend_split(
            q, q_rest, seen, keys_ptr + base, values_ptr + base, tables_ptr + row * table_stride,
            tl.maximum(split, begin), tl.minimum(split + SPLIT, end), column, scale, soft_cap,
            DTYPE, KEY, REST, VALUE, KEY_PAD, REST_PAD, COLUMNS, ROWS,
            BLOCK_L, BLOCK_SIZE, BLOCK_STRIDE, WINDOW, HAS_CAP,
        )  # fmt: skip
        m, total, acc = join(m, total, acc, m_next, total_next, acc_next)
    out = finish(m, total, acc, sinks_ptr, heads, is_row, HAS_SINKS)
    at_value = column + tl.arange(0, COLUMNS)
    place = (token * NUM_HEADS + heads)[:, None] * VALUE + at_value
    tl.store(out_ptr + place, out.to(DTYPE), mask=is_row[:, None] & (at_value < VALUE))
