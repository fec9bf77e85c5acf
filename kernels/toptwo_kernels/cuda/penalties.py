"""Penalties on logits, from how often each token came: counted on the device, applied as logits are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.ops import SamplingBatch

_BLOCK = 1024
_SEEN = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class Penalties:
    """What P of R rows are penalised for.

    slots_R: int32, which of the P a row is, -1 for none. factors_P3: float32 presence, frequency, repetition.
    tallies_PV: int32, how often a token was generated; the sign bit says that it is in the context.
    """

    slots_R: Tensor
    factors_P3: Tensor
    tallies_PV: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `read_logits` takes them."""
        return self.slots_R, self.factors_P3, self.tallies_PV


def count_tokens(device: Device, batch: SamplingBatch, vocab: int) -> Penalties | None:
    """None if no row has a penalty."""
    num_rows, num_slots = len(batch.filters_R5), len(batch.penalty_rows)
    if not num_slots:
        return None
    slots_R = torch.full((num_rows,), -1, dtype=torch.int32)
    slots_R[batch.penalty_rows] = torch.arange(num_slots, dtype=torch.int32)
    factors = torch.tensor([batch.presence, batch.frequency, batch.repetition]).T.contiguous()
    lists = [*batch.generated_tokens, *batch.context_tokens]
    starts = torch.tensor([0, *(len(tokens) for tokens in lists)]).cumsum(0)
    parts = [slots_R, factors.view(torch.int32).flatten(), starts.int(), torch.cat(lists).int()]
    arrived = send(device, torch.cat(parts))
    slots_R, factors, starts, tokens = torch.split(arrived, [len(part) for part in parts])
    tallies_PV = torch.zeros(num_slots, vocab, dtype=torch.int32, device=device.torch_device)
    blocks = max(triton.cdiv(len(each), _BLOCK) for each in lists)
    _tally[(len(lists), blocks)](
        *(tokens, starts, tallies_PV, num_slots, vocab, _BLOCK, device.pdl),
        num_warps=4,
        launch_pdl=device.pdl,
    )
    return Penalties(slots_R, factors.view(torch.float32).view(num_slots, 3), tallies_PV)


def send(device: Device, tensor: Tensor) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    if device.interpreted:
        return tensor
    return tensor.pin_memory().to(device.torch_device, non_blocking=True)


@triton.jit
def _tally(
    tokens: tl.tensor,
    starts: tl.tensor,
    tallies_PV: tl.tensor,
    num_slots: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (l, b): block b of list l; the first P lists are of generated tokens, the others contexts.

    Integers, whose atomic sum does not depend on any order.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    index = tl.program_id(0)
    at = tl.load(starts + index) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(starts + index + 1)
    places = (
        tallies_PV + (index % num_slots).to(tl.int64) * vocab + tl.load(tokens + at, mask=inside, other=0)
    )
    if index < num_slots:
        tl.atomic_add(places, 1, mask=inside, sem="relaxed")
    else:
        tl.atomic_or(places, _SEEN, mask=inside, sem="relaxed")


@triton.jit
def read_logits(
    logits_RV: tl.tensor,
    slots_R: tl.tensor,
    factors_P3: tl.tensor,
    tallies_PV: tl.tensor,
    row: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
) -> tl.tensor:
    """A row's float32 logits of `ids` after penalties, -inf beyond the vocabulary.

    slots_R may be None. The repetition's factor is applied before the subtractions.
    """
    inside = ids < vocab
    logits = tl.load(logits_RV + row * vocab + ids, mask=inside, other=-float("inf")).to(tl.float32)
    if slots_R is not None:
        slot = tl.load(slots_R + row).to(tl.int64)
        if slot >= 0:
            tallies = tl.load(tallies_PV + slot * vocab + ids, mask=inside, other=0)
            factors = factors_P3 + slot * 3
            presence, frequency, repetition = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
            repeated = tl.where(logits > 0, tl.div_rn(logits, repetition + 0 * logits), logits * repetition)
            logits = tl.where(tallies < 0, repeated, logits)
            counts = (tallies & 0x7FFFFFFF).to(tl.float32)
            logits -= tl.where(counts > 0, presence, 0.0) + frequency * counts
    return logits
