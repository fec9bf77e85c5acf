"""The experts themselves: two products of all pairs of tokens and experts, and their sum for each token.

A pair is token * K + slot. Few pairs are looked for by every program itself, many are put in order first
(`align`); the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.align import Blocks, align
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.packing import BLOCK_INPUTS, parts
from toptwo_kernels.cuda.product import multiply_slices, order_tiles, slice_inputs
from toptwo_kernels.cuda.tuning import LARGEST_BLOCK, Config, Key, expert_bucket
from toptwo_kernels.ops import ExpertWeights, Matrix, Routing

FEW_PAIRS = 256  # up to here a program finds its pairs in one vector
_SPLIT_PAIRS = 16  # up to here slices of the inputs are programs of their own
_COMBINED_AT_ONCE = 1024


def experts(device: Device, x_TH: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """See `ops.Ops.experts`. Slots with expert -1 add nothing."""
    pairs = order_pairs(device, routing, weights)
    first, second = (device.tuner.choose(key) for key in keys(weights, routing))
    hidden_PF = multiply_gate_up(device, x_TH, pairs, weights, first)
    out_SPH = multiply_down(device, hidden_PF, pairs, weights, second)
    return _combine_slots(device, out_SPH, routing, weights.down_bias_EH, x_TH.dtype)


def keys(weights: ExpertWeights, routing: Routing) -> tuple[Key, Key]:
    """What the configurations of both products are chosen by."""
    gate_up, down = weights.gate_up, weights.down
    tokens = expert_bucket(gate_up.format, routing.ids_TK.numel(), gate_up.num_matrices)
    return (
        Key("gate_up", gate_up.format, gate_up.rows // 2, gate_up.cols, tokens),
        Key("down", down.format, down.rows, down.cols, tokens),
    )


@dataclass(frozen=True)
class Pairs:
    """The pairs of a step; counts_E until somebody has counted them. blocks: None for few pairs."""

    ids_TK: Tensor
    counts_E: Tensor | None
    blocks: Blocks | None


def order_pairs(device: Device, routing: Routing, weights: ExpertWeights) -> Pairs:
    """The step's pairs, in blocks if they are many."""
    if routing.ids_TK.numel() <= FEW_PAIRS:
        return Pairs(routing.ids_TK, routing.counts_E, None)
    block = min(keys(weights, routing)[0].tokens, LARGEST_BLOCK)
    blocks = align(device, routing.ids_TK, weights.gate_up.num_matrices, block, routing.counts_E)
    return Pairs(routing.ids_TK, None, blocks)


def multiply_gate_up(
    device: Device, x_TH: Tensor, pairs: Pairs, weights: ExpertWeights, config: Config
) -> Tensor:
    """activation(gate(x), up(x)) of every pair [P, F], in x's dtype."""
    matrix = weights.gate_up
    hidden = (1, pairs.ids_TK.numel(), matrix.rows // 2)
    hidden_SPF = torch.empty(hidden, dtype=x_TH.dtype, device=x_TH.device)
    launch = _Launch(
        matrix, weights.gate_up_bias_EF, weights.activation, weights.limit, pairs.ids_TK.shape[1], matrix.cols
    )
    _multiply(device, x_TH, pairs, hidden_SPF, launch, config)
    return hidden_SPF[0]


def multiply_down(
    device: Device, hidden_PF: Tensor, pairs: Pairs, weights: ExpertWeights, config: Config
) -> Tensor:
    """down(hidden) of every pair [S, P, H], in float32 and without biases: by slices of the inputs, or one
    sum."""
    matrix, slice_cols = weights.down, slice_inputs(weights.down)
    num_slices = triton.cdiv(matrix.cols, slice_cols) if len(hidden_PF) <= _SPLIT_PAIRS else 1
    out = (num_slices, len(hidden_PF), matrix.rows)
    out_SPH = torch.empty(out, dtype=torch.float32, device=hidden_PF.device)
    launch = _Launch(matrix, None, "none", 0.0, 1, slice_cols)
    _multiply(device, hidden_PF, Pairs(pairs.ids_TK, None, pairs.blocks), out_SPH, launch, config)
    return out_SPH


@dataclass(frozen=True)
class _Launch:
    """One of the two products. pairs_per_row: pairs that read the same row of the input."""

    matrix: Matrix
    bias_EO: Tensor | None
    activation: str
    limit: float
    pairs_per_row: int
    slice_cols: int

    @property
    def is_paired(self) -> bool:
        return self.activation != "none"


def _multiply(
    device: Device, x_RI: Tensor, pairs: Pairs, out_SPO: Tensor, launch: _Launch, config: Config
) -> None:
    matrix, blocks = launch.matrix, pairs.blocks
    num_slices, num_pairs, num_rows = out_SPO.shape
    words, scales = parts(matrix)
    num_blocks = min(num_pairs, matrix.num_matrices) if blocks is None else len(blocks.experts_B)
    options = config.launch()
    if blocks is not None:
        options["BLOCK_T"] = blocks.pairs_BT.shape[1]
    tile_rows = config.block_rows // (2 if launch.is_paired else 1)
    _multiply_pairs[(num_blocks * triton.cdiv(num_rows, tile_rows), num_slices)](
        x_RI,
        words,
        scales,
        launch.bias_EO,
        pairs.ids_TK if blocks is None else blocks.pairs_BT,
        None if blocks is None else blocks.experts_B,
        pairs.counts_E,
        out_SPO,
        num_blocks,
        num_pairs,
        num_rows,
        matrix.cols,
        launch.limit,
        launch.slice_cols,
        FORMAT=matrix.format,
        ACTIVATION=launch.activation,
        SPLIT=num_slices > 1,
        EARLY=not launch.is_paired,
        PAIRS_PER_ROW=launch.pairs_per_row,
        PAIRS=triton.next_power_of_2(num_pairs) if blocks is None else 1,
        SPARSE=num_pairs < matrix.num_matrices,
        EVEN=matrix.cols % BLOCK_INPUTS.get(matrix.format, config.block_cols) == 0,
        PDL=device.pdl,
        launch_pdl=device.pdl,
        **options,
    )


@triton.jit
def _multiply_pairs(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    num_blocks: tl.tensor,
    num_pairs: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    limit: tl.tensor,
    slice_cols: tl.tensor,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    PAIRS: tl.constexpr,
    SPARSE: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
) -> None:
    """BLOCK_O rows for a block of one expert's pairs, as `align` makes them; or, when experts is None, for
    all pairs of one expert: the block is its number, or if SPARSE the number of a pair that has it, and
    nothing is left to do if an earlier pair has it too.

    EARLY: whether pairs and experts were there before what this launch waits for.
    """
    if PDL and not EARLY:
        gdc_wait()
    HALVES: tl.constexpr = 1 if ACTIVATION == "none" else 2
    ROWS: tl.constexpr = BLOCK_O // HALVES
    block, tile = order_tiles(num_blocks, tl.cdiv(rows, ROWS), GROUP_T)
    at_T = tl.arange(0, BLOCK_T)
    # Half of the rows are gates, and half the ups that belong to them.
    half_O = tl.arange(0, BLOCK_O) // ROWS
    rows_O = tl.minimum(tile * ROWS + tl.arange(0, BLOCK_O) % ROWS, rows - 1)
    if experts is not None:
        expert = tl.load(experts + block)
        if PDL and EARLY:
            gdc_wait()
        if expert >= 0:
            pairs_T = tl.load(pairs + block * BLOCK_T + at_T)
            _multiply_tile(
                x, words, scales, bias, out, expert * HALVES + half_O, rows_O, pairs_T, pairs_T < num_pairs,
                tile, num_pairs, rows, cols, limit, slice_cols,
                FORMAT, ACTIVATION, SPLIT, PAIRS_PER_ROW, EVEN, BLOCK_O, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    else:
        at_P = tl.arange(0, PAIRS)
        ids_P = tl.load(pairs + at_P, mask=at_P < num_pairs, other=-1).to(tl.int32)
        expert = block
        if SPARSE:
            expert = tl.sum(tl.where(at_P == block, ids_P, 0), axis=0)
        mine_P = ((ids_P == expert) & (ids_P >= 0)).to(tl.int32)
        count = tl.sum(mine_P, axis=0)
        if SPARSE:
            count = tl.where(tl.sum(tl.where(at_P < block, mine_P, 0), axis=0) > 0, 0, count)
        matrix_O = expert * HALVES + half_O
        if PDL and EARLY:
            gdc_wait()
        if counts is not None and (tile == 0) & (count > 0):
            tl.store(counts + expert, tl.load(counts + expert) + count)
        ranks_P = tl.where(mine_P > 0, tl.cumsum(mine_P, axis=0) - 1, -1)
        for start in range(0, count, BLOCK_T):
            here_TP = ranks_P[None, :] == (start + at_T)[:, None]
            pairs_T = tl.sum(tl.where(here_TP, at_P[None, :], 0), axis=1)
            _multiply_tile(
                x, words, scales, bias, out, matrix_O, rows_O, pairs_T, start + at_T < count,
                tile, num_pairs, rows, cols, limit, slice_cols,
                FORMAT, ACTIVATION, SPLIT, PAIRS_PER_ROW, EVEN, BLOCK_O, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    if PDL:
        gdc_launch_dependents()  # not before: what comes next would crowd the processors that are free first


@triton.jit
def _multiply_tile(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    matrix_O: tl.tensor,
    rows_O: tl.tensor,
    pairs_T: tl.tensor,
    live_T: tl.tensor,
    tile: tl.tensor,
    num_pairs: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    limit: tl.tensor,
    slice_cols: tl.tensor,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """out[pair, rows] of one expert, or of a slice; with an activation, of gates and ups joined."""
    pairs_T = tl.where(live_T, pairs_T, 0).to(tl.int64)
    slice_id = tl.program_id(1)
    x_T = x + pairs_T // PAIRS_PER_ROW * cols
    sums_OT = multiply_slices(
        x_T, words, scales, matrix_O, rows_O, rows, cols, slice_id, slice_cols,
        SPLIT, FORMAT, EVEN, BLOCK_O, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        sums_OT += tl.load(bias + matrix_O * rows + rows_O)[:, None]
    ROWS: tl.constexpr = BLOCK_O if ACTIVATION == "none" else BLOCK_O // 2
    if ACTIVATION != "none":
        both_OT2 = tl.permute(tl.reshape(sums_OT, (2, ROWS, BLOCK_T)), (1, 2, 0))
        gates_OT, ups_OT = tl.split(both_OT2)
        sums_OT = _join(gates_OT, ups_OT, limit, ACTIVATION)
    at_O = tile * ROWS + tl.arange(0, ROWS)
    mask_OT = (at_O < rows)[:, None] & live_T[None, :]
    out_OT = out + (slice_id * num_pairs + pairs_T)[None, :] * rows + at_O[:, None]
    tl.store(out_OT, sums_OT.to(out.dtype.element_ty), mask=mask_OT)


@triton.jit
def _join(gate: tl.tensor, up: tl.tensor, limit: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """See `ops.Activation`."""
    if ACTIVATION == "silu":
        joined = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (gate + 0.044715 gate^3)
        joined = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        joined = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    return joined


def _combine_slots(
    device: Device, out_SPH: Tensor, routing: Routing, bias_EH: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_tokens, top_k = routing.ids_TK.shape
    num_slices, _, width = out_SPH.shape
    total_TH = torch.empty((num_tokens, width), dtype=dtype, device=out_SPH.device)
    _combine[(num_tokens, triton.cdiv(width, _COMBINED_AT_ONCE))](
        out_SPH,
        routing.ids_TK,
        routing.weights_TK,
        bias_EH,
        total_TH,
        width,
        SLICES=num_slices,
        TOP_K=top_k,
        BLOCK_H=_COMBINED_AT_ONCE,
        PDL=device.pdl,
        launch_pdl=device.pdl,
    )
    return total_TH


@triton.jit
def _combine(
    out: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    width: tl.tensor,
    SLICES: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """total [T, H] = the sum over slots, in order, of weights [T, K] times what out [S, T, K, H] adds up to,
    with the expert's bias [E, H]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, num_tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    at_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + slot)
        live = expert >= 0
        out_H = tl.zeros([BLOCK_H], tl.float32)
        for slice_id in tl.static_range(SLICES):
            pair = (slice_id * num_tokens + token) * TOP_K + slot
            out_H += tl.load(out + pair * width + at_H, mask=live & (at_H < width), other=0.0)
        if bias is not None:
            out_H += tl.load(bias + expert * width + at_H, mask=live & (at_H < width), other=0.0)
        # A padding token's weight may be anything, NaN included.
        sum_H += out_H * tl.where(live, tl.load(weights + token * TOP_K + slot), 0.0)
    tl.store(total + token * width + at_H, sum_H.to(total.dtype.element_ty), mask=at_H < width)
