"""Pairs of tokens and experts in blocks that have one expert each, made on the device.

The pairs of an expert stay in the order of the step and are filled up to whole blocks. How many blocks there
are is known only there, so kernels are launched for as many as there can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device

_AT_ONCE = 1024  # pairs that a program looks at together


@dataclass(frozen=True)
class Blocks:
    """pairs_BT: pairs of B blocks, the number of all pairs where there is none; experts_B: the expert of each
    block, -1 for blocks behind the last, whose pairs mean nothing."""

    pairs_BT: Tensor
    experts_B: Tensor


def align(
    device: Device, ids_TK: Tensor, num_experts: int, block_tokens: int, counts_E: Tensor | None
) -> Blocks:
    """Blocks of `block_tokens` pairs; a pair is token * K + slot, and those with id -1 are left out.

    What came to each expert is added to counts_E.
    """
    num_pairs, where = ids_TK.numel(), ids_TK.device
    num_blocks = min(num_pairs, triton.cdiv(num_pairs, block_tokens) + num_experts)
    found_E = torch.empty(num_experts, dtype=torch.int32, device=where)
    pairs_BT = torch.empty((num_blocks, block_tokens), dtype=torch.int32, device=where)
    experts_B = torch.empty(num_blocks, dtype=torch.int32, device=where)
    launch = {"PDL": device.pdl, "launch_pdl": device.pdl, "AT_ONCE": _AT_ONCE}
    _count[(num_experts,)](ids_TK, found_E, counts_E, num_pairs, **launch)
    _place[(num_experts + 1,)](
        ids_TK,
        found_E,
        pairs_BT,
        experts_B,
        num_pairs,
        num_experts,
        num_blocks,
        BLOCK_T=block_tokens,
        EXPERTS=triton.next_power_of_2(num_experts),
        **launch,
    )
    return Blocks(pairs_BT, experts_B)


@triton.jit
def _count(
    ids: tl.tensor,
    found: tl.tensor,
    counts: tl.tensor,
    num_pairs: tl.tensor,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """How many of the pairs have this program's expert: into found [E], and added to counts [E]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    total = 0
    for start in range(0, num_pairs, AT_ONCE):
        at_P = start + tl.arange(0, AT_ONCE)
        ids_P = tl.load(ids + at_P, mask=at_P < num_pairs, other=-1)
        total += tl.sum((ids_P == expert).to(tl.int32), axis=0)
    tl.store(found + expert, total)
    if counts is not None:
        tl.store(counts + expert, tl.load(counts + expert) + total)


@triton.jit
def _place(
    ids: tl.tensor,
    found: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    num_pairs: tl.tensor,
    num_experts: tl.tensor,
    num_blocks: tl.tensor,
    AT_ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The blocks of this program's expert, behind those of the experts before; the program behind the last
    expert marks the blocks that nobody has."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    at_E = tl.arange(0, EXPERTS)
    found_E = tl.load(found + at_E, mask=at_E < num_experts, other=0)
    blocks_E = (found_E + BLOCK_T - 1) // BLOCK_T
    first = tl.sum(tl.where(at_E < expert, blocks_E, 0), axis=0)
    mine = tl.sum(tl.where(at_E == expert, blocks_E, 0), axis=0)
    end = tl.where(expert == num_experts, num_blocks, first + mine)
    marked = tl.where(expert == num_experts, -1, expert)
    for start in range(first, end, AT_ONCE):
        at_B = start + tl.arange(0, AT_ONCE)
        tl.store(experts + at_B, tl.zeros([AT_ONCE], tl.int32) + marked, mask=at_B < end)
    rank = first * BLOCK_T
    if mine > 0:
        for start in range(0, num_pairs, AT_ONCE):
            at_P = start + tl.arange(0, AT_ONCE)
            mine_P = (tl.load(ids + at_P, mask=at_P < num_pairs, other=-1) == expert).to(tl.int32)
            ranks_P = rank + tl.cumsum(mine_P, axis=0) - mine_P
            tl.store(pairs + ranks_P, at_P, mask=mine_P > 0)
            rank += tl.sum(mine_P, axis=0)
        at_T = rank + tl.arange(0, BLOCK_T)
        tl.store(
            pairs + at_T, tl.zeros([BLOCK_T], tl.int32) + num_pairs, mask=at_T < (first + mine) * BLOCK_T
        )
