"""From logits to the next token, without sorting.

A row's probabilities are kept as weights, relative to its largest, in the bits of their float32, which have
the order of the numbers since none is negative. The walk of the contract, from the most probable token down
and by id among equals, never takes place: where it would end is found by halving the range of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.penalties import count_tokens, read_logits, send
from toptwo_kernels.ops import SamplingBatch

_CHUNK = 2048  # tokens of the vocabulary that a program looks at
_BLOCK = 8192  # weights that a row's own program takes at a time
_MOST = tl.constexpr(0x3F800000)  # the bits of 1, the largest weight
_NO_BITS = tl.constexpr(0x7FFFFFFF)


def sample(device: Device, logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """See `ops.Ops.sample`. Computed in float32, sums in float64; the ids stay on the device."""
    num_rows, vocab = logits_RV.shape
    num_chunks = triton.cdiv(vocab, _CHUNK)
    penalties = count_tokens(device, batch, vocab)
    logits = (logits_RV, *(penalties.tensors if penalties else (None, None, None)))
    filters_R5 = send(device, batch.filters_R5)
    most_RC = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device.torch_device)
    first_RC = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device.torch_device)
    _find_largest[(num_rows, num_chunks)](
        *(*logits, most_RC, first_RC, vocab, _CHUNK, device.pdl), num_warps=4, launch_pdl=device.pdl
    )
    block_chunks = triton.next_power_of_2(num_chunks)
    bits_RV, masses_RC = None, None
    if (batch.filters_R5[:, 0].float() > 0).any():
        bits_RV = torch.empty(num_rows, vocab, dtype=torch.int32, device=device.torch_device)
        masses_RC = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=device.torch_device)
        _weigh[(num_rows, num_chunks)](
            *(*logits, most_RC, filters_R5, bits_RV, masses_RC, vocab, _CHUNK, block_chunks, device.pdl),
            num_warps=4,
            launch_pdl=device.pdl,
        )
    ids_R = torch.empty(num_rows, dtype=torch.int64, device=device.torch_device)
    _pick[(num_rows,)](
        *(most_RC, first_RC, filters_R5, bits_RV, masses_RC, ids_R, vocab, num_chunks),
        *(_CHUNK, block_chunks, min(_BLOCK, triton.next_power_of_2(vocab)), device.pdl),
        num_warps=32 if bits_RV is not None else 4,
        launch_pdl=device.pdl,
    )
    return ids_R


@triton.jit
def _find_largest(
    logits_RV: tl.tensor,
    slots_R: tl.tensor,
    factors_P3: tl.tensor,
    tallies_PV: tl.tensor,
    most_RC: tl.tensor,
    first_RC: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (r, c): the largest logit of chunk c, inf where one is no number, and who has it first."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = read_logits(logits_RV, slots_R, factors_P3, tallies_PV, row, ids, vocab)
    logits = tl.where(logits == logits, logits, float("inf"))
    most = tl.max(logits)
    place = row * tl.num_programs(1) + chunk
    tl.store(most_RC + place, most)
    tl.store(first_RC + place, tl.min(tl.where(logits == most, ids, vocab)))


@triton.jit
def _weigh(
    logits_RV: tl.tensor,
    slots_R: tl.tensor,
    factors_P3: tl.tensor,
    tallies_PV: tl.tensor,
    most_RC: tl.tensor,
    filters_R5: tl.tensor,
    bits_RV: tl.tensor,
    masses_RC: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (r, c): the weights of chunk c, and their sum; nothing where row r is not drawn."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    most = _largest(most_RC + row * tl.num_programs(1), tl.num_programs(1), BLOCK_C)
    temperature = tl.load(filters_R5 + row * 5).to(tl.float32)
    if (temperature > 0) & (tl.abs(most) < float("inf")):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = read_logits(logits_RV, slots_R, factors_P3, tallies_PV, row, ids, vocab)
        # From the largest logit down: dividing by a tiny temperature must not overflow to inf - inf.
        weights = tl.exp(tl.div_rn(logits - most, temperature + tl.zeros_like(logits)))
        tl.store(bits_RV + row * vocab + ids, weights.to(tl.int32, bitcast=True), mask=ids < vocab)
        tl.store(masses_RC + row * tl.num_programs(1) + chunk, tl.sum(weights.to(tl.float64)))


@triton.jit
def _pick(
    most_RC: tl.tensor,
    first_RC: tl.tensor,
    filters_R5: tl.tensor,
    bits_RV: tl.tensor,
    masses_RC: tl.tensor,
    ids_R: tl.tensor,
    vocab: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program r: the token of row r. bits_RV is None where no row is drawn."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK_C)
    most_C = tl.load(most_RC + row * num_chunks + chunks, mask=chunks < num_chunks, other=-float("inf"))
    first_C = tl.load(first_RC + row * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    most = tl.max(most_C)
    token = tl.min(tl.where((most_C == most) & (chunks < num_chunks), first_C, vocab))
    is_valid = tl.abs(most) < float("inf")
    if bits_RV is not None:
        filters = filters_R5 + row * 5
        if is_valid & (tl.load(filters).to(tl.float32) > 0):
            top_k, top_p, min_p = tl.load(filters + 1), tl.load(filters + 2), tl.load(filters + 3)
            bits_V = bits_RV + row * vocab
            if ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0):
                token = _walk_down(bits_V, filters, vocab, BLOCK_V)
            else:
                masses_C = tl.load(masses_RC + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
                token = _walk_up(bits_V, masses_C, chunks, tl.load(filters + 4), vocab, CHUNK)
    tl.store(ids_R + row, tl.where(is_valid, token, -1).to(tl.int64))


@triton.jit
def _largest(most_C: tl.tensor, num_chunks: tl.tensor, BLOCK_C: tl.constexpr) -> tl.tensor:
    chunks = tl.arange(0, BLOCK_C)
    return tl.max(tl.load(most_C + chunks, mask=chunks < num_chunks, other=-float("inf")))


@triton.jit
def _weight(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _walk_up(
    bits_V: tl.tensor,
    masses_C: tl.tensor,
    chunks: tl.tensor,
    uniform: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """The first token, by id, at which the running sum exceeds the uniform's part of the whole.

    u * sum can round up to the sum itself; the last token with any weight has it then.
    """
    running_C = tl.cumsum(masses_C)
    target = uniform * tl.max(running_C)
    chunk = tl.min(tl.where((running_C > target) & (masses_C > 0), chunks, _NO_BITS))
    chunk = tl.minimum(chunk, tl.max(tl.where(masses_C > 0, chunks, 0)))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    weights = _weight(tl.load(bits_V + ids, mask=ids < vocab, other=0))
    running = tl.max(tl.where(chunks < chunk, running_C, 0.0)) + tl.cumsum(weights)
    token = tl.min(tl.where((running > target) & (weights > 0), ids, _NO_BITS))
    return tl.minimum(token, tl.max(tl.where(weights > 0, ids, 0)))


@triton.jit
def _walk_down(bits_V: tl.tensor, filters: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The token that the filters' uniform draws among those that they keep.

    Kept are all weights above `least`, and as many of those that equal it as `kept` says, by id.
    """
    top_k, top_p, min_p = tl.load(filters + 1).to(tl.int32), tl.load(filters + 2), tl.load(filters + 3)
    kept, mass, least, _ = _survey(bits_V, vocab, 1, BLOCK)
    if (top_k > 0) & (top_k < vocab):
        least, kept, above, mass_above = _search(bits_V, vocab, least, top_k, 0.0, BLOCK)
        kept = tl.minimum(kept, top_k - above)
        mass = mass_above + kept * _weight(least)
    if top_p < 1:
        target = top_p * mass
        bits, equals, _, mass_above = _search(bits_V, vocab, least, 1, target, BLOCK)
        equals = tl.where(bits == least, tl.minimum(equals, kept), equals)
        kept = tl.maximum(1, _count_to(target, mass_above, bits, equals))
        kept = tl.minimum(kept + (mass_above + kept * _weight(bits) < target).to(tl.int32), equals)
        least, mass = bits, mass_above + kept * _weight(bits)
    if min_p > 0:
        bits = tl.minimum(min_p, 1.0).to(tl.float32).to(tl.int32, bitcast=True)
        if bits > least:
            kept, mass, least, _ = _survey(bits_V, vocab, bits, BLOCK)
    target = tl.load(filters + 4) * mass
    # The running sum must exceed the target: reach the next number.
    reached = (target.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True)
    bits, equals, _, mass_above = _search(bits_V, vocab, least, 1, reached, BLOCK)
    equals = tl.where(bits == least, tl.minimum(equals, kept), equals)
    index = tl.minimum(_count_to(target, mass_above, bits, equals), equals - 1)
    return _find(bits_V, vocab, bits, index, BLOCK)


@triton.jit
def _count_to(target: tl.tensor, mass_above: tl.tensor, bits: tl.tensor, equals: tl.tensor) -> tl.tensor:
    """How many whole weights, of `equals` equal ones, lie between the mass above them and the target."""
    number = tl.maximum((target - mass_above) / _weight(bits), 0.0)
    return tl.minimum(number, equals.to(tl.float64)).to(tl.int32)


@triton.jit
def _search(
    bits_V: tl.tensor,
    vocab: tl.tensor,
    low: tl.tensor,
    need_count: tl.tensor,
    need_mass: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The greatest weight, from `low` on, which together with all above it is so many and so much.

    Returns its bits, how many equal it, and how many and how much is above; the least weight from `low` on if
    all together do not suffice.
    """
    count_low, _, low, _ = _survey(bits_V, vocab, low, BLOCK)
    high, count_high = tl.full([], _MOST + 1, tl.int32), tl.full([], 0, tl.int32)
    mass_high = tl.full([], 0, tl.float64)
    while high - low > 1:
        count, mass, least, below = _survey(bits_V, vocab, (low + high) // 2, BLOCK)
        suffices = (count >= need_count) & (mass >= need_mass)
        # Between the two there is nothing: the next range begins or ends at a weight that exists.
        low, high = tl.where(suffices, least, low), tl.where(suffices, high, below + 1)
        count_low = tl.where(suffices, count, count_low)
        count_high = tl.where(suffices, count_high, count)
        mass_high = tl.where(suffices, mass_high, mass)
    return low, count_low - count_high, count_high, mass_high


@triton.jit
def _survey(bits_V: tl.tensor, vocab: tl.tensor, border: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Of weights whose bits are at least `border`: how many, their sum, the least; and the greatest below.

    Sums of float32 that are not negative, in one order, grow with what is added: the search relies on it.
    """
    span = tl.arange(0, BLOCK)
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    least, below = tl.full([BLOCK], _NO_BITS, tl.int32), tl.full([BLOCK], -1, tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        bits = tl.load(bits_V + start + span, mask=start + span < vocab, other=-1)
        inside = bits >= border
        count += inside.to(tl.int32)
        mass += tl.where(inside, bits, 0).to(tl.float32, bitcast=True)
        least = tl.minimum(least, tl.where(inside, bits, _NO_BITS))
        below = tl.maximum(below, tl.where(inside, -1, bits))
    return tl.sum(count), tl.sum(mass.to(tl.float64)), tl.min(least), tl.max(below)


@triton.jit
def _find(
    bits_V: tl.tensor, vocab: tl.tensor, wanted: tl.tensor, index: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The id of number `index` of the weights with these bits."""
    span = tl.arange(0, BLOCK)
    start, before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    same = tl.load(bits_V + span, mask=span < vocab, other=-1) == wanted
    while (before + tl.sum(same.to(tl.int32)) <= index) & (start < vocab):
        before += tl.sum(same.to(tl.int32))
        start += BLOCK
        same = tl.load(bits_V + start + span, mask=start + span < vocab, other=-1) == wanted
    at_index = before + tl.cumsum(same.to(tl.int32)) == index + 1
    return tl.min(tl.where(same & at_index, start + span, _NO_BITS))
