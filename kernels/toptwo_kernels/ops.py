"""The contract between layers and kernels: what every backend computes, not how.

Shape letters, used in all names: T tokens of a step, R rows (sequences) of a step, L context
length, B KV blocks, S slots in a block, H hidden, E experts, K experts chosen per token, F expert
FFN width, V vocabulary, N query heads, M KV heads, D head dimension, I/O in and out features.

A backend is a module with the functions of `Ops`; `registry.load_backend` finds it by name. What a
backend may rely on: contiguous row-major tensors, all on one device (only x of `apply_rope` and k and
v of `write_kv` may be views with a longer token stride, as they are cut out of one QKV product);
token rows in the order of the step; int64 ids. What it must promise: a row's result does not depend
on which rows share its step beyond the rounding that its docstring states, and nothing outside the
named outputs is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Activation = Literal["silu"]
ScoreFunction = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class RouterSpec:
    """How expert scores become a choice. Plain data that describes every router family.

    top_k: experts chosen per token.
    score: function from logits to scores.
    over_selected: apply `score` to the chosen logits only (Mistral's own code) instead of to all.
    renormalize: divide the chosen scores by their sum.
    scale: factor on the final weights.

    Ties go to the lowest expert id. Scores are computed in float32.
    """

    num_experts: int
    top_k: int
    score: ScoreFunction = "softmax"
    over_selected: bool = False
    renormalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and {self.num_experts} experts, not {self.top_k}")


@dataclass(frozen=True)
class Routing:
    """The choice of experts: logical expert ids and their float32 weights, best first."""

    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where their KV lives.

    Row r covers the tokens [query_starts_R1[r], query_starts_R1[r + 1]) of the step, which are the
    last ones of a context of context_lens_R[r] tokens (their own KV included). Token j of the
    context lies in block block_tables_RB[r, j // S] at offset j % S; entries behind the context's
    last block mean nothing.

    Example: block size 4, one row that decodes its 6th token from blocks 7 and 2:
    query_starts [0, 1], context_lens [6], block_tables [[7, 2]]; its KV slots are 28..31, 8, 9.
    """

    query_starts_R1: Tensor
    context_lens_R: Tensor
    block_tables_RB: Tensor
    block_size: int


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of R rows, as tensors. Units and order as in `Ops.sample`.

    penalty_rows: rows with any penalty; the two token lists below belong to them, in order.
    generated_tokens, context_tokens: per penalty row, the ids generated so far, and all ids so far.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    uniform_R: Tensor
    penalty_rows: list[int]
    presence: list[float]
    frequency: list[float]
    repetition: list[float]
    generated_tokens: list[Tensor]
    context_tokens: list[Tensor]


class Ops(Protocol):
    """The functions of a backend module."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """x @ weight.T."""

    def apply_rope(self, x_TND: Tensor, positions_T: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
        """Rotary embedding in the half-rotation layout (arXiv 2104.09864); tables as `rope_tables`."""

    def write_kv(
        self, k_TMD: Tensor, v_TMD: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor
    ) -> None:
        """Store keys and values; caches are [B, S, M, D], a slot is block * S + offset."""

    def plan_attention(self, batch: AttentionBatch) -> object:
        """What `attention` can prepare once per step and reuse in every layer."""

    def attention(
        self, q_TND: Tensor, k_cache: Tensor, v_cache: Tensor, plan: object, scale: float
    ) -> Tensor:
        """Causal attention of every token over its own sequence's cached KV; returns [T, N, D].

        Query head n reads KV head n // (N / M) (grouped-query attention, arXiv 2305.13245).
        """

    def route(self, logits_TE: Tensor, spec: RouterSpec) -> Routing:
        """Choose experts for every token."""

    def experts(
        self, x_TH: Tensor, routing: Routing, gate_up_EFH: Tensor, down_EHF: Tensor, activation: Activation
    ) -> Tensor:
        """Sum over the chosen experts of weight * down(act(gate(x)) * up(x)), in slot order.

        gate_up_EFH is [E, 2F, H], gate rows first; only chosen experts are computed, each once for
        all of its tokens.
        """

    def sample(self, logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
        """Next token ids [R]: penalties, temperature, top_k, top_p, min_p, inverse-CDF draw.

        uniform_R in [0, 1) is the row's only randomness. Temperature 0 takes the largest logit
        after penalties, the lowest id among equals. A row whose logits are not numbers gets -1.
        """


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/D) for i < D/2, float32, each [length, D/2]."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    return angles.cos(), angles.sin()
