"""The router: logits in float32, and the choice of experts from them.

Logits come in parts, one for every so many columns of x, so that a single token occupies several processors.
Which columns make a part is fixed, and parts are added up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from toptwo_kernels.cuda.device import Device
from toptwo_kernels.ops import RouterSpec, RouterWeights, Routing

_PART_COLUMNS = 256
_BLOCK_EXPERTS = 16  # the least that matrix units take; more would only leave processors idle
_BLOCK_COLUMNS = 64
_FEW_TOKENS, _MANY_TOKENS = 16, 64  # of a program

# Numbers are compared by their places in an order, see _order.
_TAKEN = tl.constexpr(-(2**31))  # before every number
_LAST = tl.constexpr(-(2**31) + 2**23 - 1)  # the place of -inf


def route(device: Device, x_TH: Tensor, router: RouterWeights, spec: RouterSpec) -> Routing:
    """See `ops.Ops.route`. Ids are int32; padding tokens get ids -1 and weights 0."""
    parts_PTE = _multiply(device, x_TH, router.matrix.data[0])
    num_parts, num_tokens, num_experts = parts_PTE.shape
    ids_TK = torch.empty(num_tokens, spec.top_k, dtype=torch.int32, device=device.torch_device)
    weights_TK = torch.empty(num_tokens, spec.top_k, dtype=torch.float32, device=device.torch_device)
    _choose[(num_tokens,)](
        *(parts_PTE, router.logit_bias_E, router.selection_bias_E, device.num_live, ids_TK, weights_TK),
        *(spec.scale, 2 * spec.jitter, num_experts, num_parts, spec.top_k, spec.score),
        *(spec.over_selected, spec.renormalize, spec.num_groups, spec.top_groups, spec.group_score),
        *(triton.next_power_of_2(num_experts), triton.next_power_of_2(spec.top_k)),
        *(triton.next_power_of_2(spec.num_groups), device.pdl),
        num_warps=1,
        launch_pdl=device.pdl,
    )
    return Routing(ids_TK, weights_TK)


def _multiply(device: Device, x_TH: Tensor, matrix_EH: Tensor) -> Tensor:
    """Parts [P, T, E] whose sum over P is x @ matrix.T."""
    (num_tokens, width), num_experts = x_TH.shape, len(matrix_EH)
    num_parts = triton.cdiv(width, _PART_COLUMNS)
    parts_PTE = torch.empty(
        num_parts, num_tokens, num_experts, dtype=torch.float32, device=device.torch_device
    )
    block_tokens = _FEW_TOKENS if num_tokens <= _FEW_TOKENS * device.num_processors else _MANY_TOKENS
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_experts, _BLOCK_EXPERTS), num_parts)
    _multiply_part[grid](
        *(x_TH, matrix_EH, parts_PTE, num_tokens, num_experts, width),
        *(_PART_COLUMNS, block_tokens, _BLOCK_EXPERTS, _BLOCK_COLUMNS, device.pdl),
        num_warps=4,
        num_stages=4,
        launch_pdl=device.pdl,
    )
    return parts_PTE


@triton.jit
def _multiply_part(
    x_TH: tl.tensor,
    matrix_EH: tl.tensor,
    parts_PTE: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    width: tl.tensor,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (t, e, p): part p of the logits of block e of experts for block t of tokens.

    Experts are the rows that matrix units take 16 of, and tokens the columns, so that a logit's bits do not
    depend on how many tokens there are.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(2)
    x_rows = x_TH + tokens.to(tl.int64)[None, :] * width
    matrix_rows = matrix_EH + experts[:, None] * width
    total = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for start in range(0, tl.minimum(PART, width - part * PART), BLOCK_H):
        columns = part * PART + start + tl.arange(0, BLOCK_H)
        real = (columns < width)[None, :] & (experts < num_experts)[:, None]
        matrix = tl.load(matrix_rows + columns[None, :], mask=real, other=0.0)
        given = (columns < width)[:, None] & (tokens < num_tokens)[None, :]
        x = tl.load(x_rows + columns[:, None], mask=given, other=0.0).to(tl.float32)
        # Matrix units take every number as a sum of two of theirs, which loses the last bit or two.
        total = tl.dot(matrix, x, total, input_precision="tf32x3")
    inside = (experts < num_experts)[:, None] & (tokens < num_tokens)[None, :]
    out = parts_PTE + (part.to(tl.int64) * num_tokens + tokens[None, :]) * num_experts + experts[:, None]
    tl.store(out, total, mask=inside)


@triton.jit
def _choose(
    parts_PTE: tl.tensor,
    logit_bias_E: tl.tensor,
    selection_bias_E: tl.tensor,
    num_live: tl.tensor,
    ids_TK: tl.tensor,
    weights_TK: tl.tensor,
    factor: tl.tensor,
    near: tl.tensor,
    num_experts: tl.tensor,
    NUM_PARTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    OVER_SELECTED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program t: the choice for token t. The biases and num_live may be None."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    experts, slots = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = experts < num_experts
    logits = _add_up(parts_PTE, token, experts, num_experts, NUM_PARTS)
    if logit_bias_E is not None:
        logits += tl.load(logit_bias_E + experts, mask=real, other=0.0)
    logits = tl.where(real, logits, -float("inf"))
    if SCORE == "sparsemixer":
        ids, weights = _mix_sparsely(logits, experts, slots, near)
    else:
        scores = logits
        if not OVER_SELECTED:
            scores = _score(logits, SCORE)
        ranked = scores
        if selection_bias_E is not None:
            ranked += tl.load(selection_bias_E + experts, mask=real, other=0.0)
        order = tl.where(real, _order(ranked), _TAKEN)
        if NUM_GROUPS > 1:
            group = experts // (num_experts // NUM_GROUPS)
            kept = _best_groups(order, group, NUM_GROUPS, TOP_GROUPS, GROUP_SCORE, BLOCK_G)
            order = tl.where(kept | ~real, order, _LAST)
        ids, weights = _take_best(order, scores, experts, slots, TOP_K)
        chosen = slots < TOP_K
        if OVER_SELECTED:
            weights = tl.where(chosen, _score(tl.where(chosen, weights, -float("inf")), SCORE), 0.0)
        if RENORMALIZE:
            weights /= tl.sum(weights)
    weights *= factor
    if num_live is not None:
        live = token < tl.load(num_live)
        ids, weights = tl.where(live, ids, -1), tl.where(live, weights, 0.0)
    tl.store(ids_TK + token * TOP_K + slots, ids, mask=slots < TOP_K)
    tl.store(weights_TK + token * TOP_K + slots, weights, mask=slots < TOP_K)


@triton.jit
def _add_up(
    parts_PTE: tl.tensor,
    token: tl.tensor,
    experts: tl.tensor,
    num_experts: tl.tensor,
    NUM_PARTS: tl.constexpr,
) -> tl.tensor:
    """The logits of the program's token, from their parts; 0 beyond the last expert."""
    logits = tl.zeros(experts.shape, tl.float32)
    for part in tl.static_range(NUM_PARTS):
        place = (part * tl.num_programs(0) + token) * num_experts
        logits += tl.load(parts_PTE + place + experts, mask=experts < num_experts, other=0.0)
    return logits


@triton.jit
def _order(numbers: tl.tensor) -> tl.tensor:
    """An int32 for each float32, in the same order; NaN comes behind all.

    There is no -0 among them: a sum that begins with 0 never becomes that.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(numbers == numbers, order, 0x7FFFFFFF)


@triton.jit
def _value(order: tl.tensor) -> tl.tensor:
    """The float32 that has this place."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _score(logits: tl.tensor, SCORE: tl.constexpr) -> tl.tensor:
    """-inf stands for no logit, and scores 0."""
    if SCORE == "sigmoid":
        return 1 / (1 + tl.exp(-logits))
    powers = tl.exp(logits - tl.max(logits))
    return powers / tl.sum(powers)


@triton.jit
def _first_of_most(order: tl.tensor, indices: tl.tensor) -> tl.tensor:
    """The lowest index where `order` is greatest."""
    return tl.min(tl.where(order == tl.max(order), indices, 0x7FFFFFFF))


@triton.jit
def _take_best(
    order: tl.tensor, scores: tl.tensor, experts: tl.tensor, slots: tl.tensor, TOP_K: tl.constexpr
) -> tl.tensor:
    """Ids and scores of the best experts, by slot."""
    ids = tl.zeros_like(slots)
    weights = slots.to(tl.float32) * 0
    for k in range(TOP_K):
        best = _first_of_most(order, experts)
        ids = tl.where(slots == k, best, ids)
        weights = tl.where(slots == k, tl.sum(tl.where(experts == best, scores, 0.0)), weights)
        order = tl.where(experts == best, _TAKEN, order)
    return ids, weights


@triton.jit
def _best_groups(
    order: tl.tensor,
    group: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> tl.tensor:
    """Whether each expert is in one of the best groups."""
    groups = tl.arange(0, BLOCK_G)
    strength = tl.full([BLOCK_G], _TAKEN, tl.int32)
    for g in range(NUM_GROUPS):
        own = tl.where(group == g, order, _TAKEN)
        strongest = tl.max(own)
        if GROUP_SCORE == "best_two":
            places = tl.arange(0, own.shape[0])
            second = tl.max(tl.where(places == _first_of_most(own, places), _TAKEN, own))
            strongest = _order(_value(strongest) + _value(second))
        strength = tl.where(groups == g, strongest, strength)
    kept = group < 0
    for _ in range(TOP_GROUPS):
        best = _first_of_most(strength, groups)
        kept = kept | (group == best)
        strength = tl.where(groups == best, _TAKEN, strength)
    return kept


@triton.jit
def _mix_sparsely(logits: tl.tensor, experts: tl.tensor, slots: tl.tensor, near: tl.tensor) -> tl.tensor:
    """Two experts, each weighted among the logits that come near its own (arXiv 2409.12136)."""
    ids = tl.zeros_like(slots)
    weights = slots.to(tl.float32) * 0
    left = logits
    order = _order(logits)
    for k in range(2):
        best = _first_of_most(order, experts)
        most = tl.sum(tl.where(experts == best, logits, 0.0))
        distance = tl.div_rn(most - logits, tl.maximum(tl.abs(logits), most))
        powers = tl.where(distance > near, 0.0, tl.exp(left - most))
        ids = tl.where(slots == k, best, ids)
        weights = tl.where(slots == k, 1 / tl.sum(powers), weights)
        left = tl.where(experts == best, -float("inf"), left)
        order = tl.where(experts == best, _TAKEN, order)
    return ids, weights
