"""The contract between layers and kernels: what every backend computes, not how.

Shape letters, used in all names: T tokens of a step, R rows (sequences) of a step, S tokens selected
for logits, L context length, B KV blocks, H hidden, E experts, K experts chosen per token, F expert FFN
width, V vocabulary, N query heads, M KV heads, D head dimension, I/O in and out features.

A backend is an object with the functions of `Ops`; `registry.load_backend` makes it by name. Layers call
nothing but ops on activations, so that a backend can record a forward pass and replay it. What a
backend may rely on: contiguous row-major tensors, all on one device; token rows in the order of the
step; int64 ids. What it must promise: a row's result does not depend on which rows share its step
beyond the rounding that its docstring states, and nothing outside the named outputs is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Activation = Literal["silu"]
ScoreFunction = Literal["softmax", "sigmoid"]
WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "int4"]
QUANTIZED: tuple[WeightFormat, ...] = ("int8", "int4")
GROUP = 32  # consecutive inputs that share a scale in the quantised formats

KVCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, in a layout that only the backend knows."""


@dataclass(frozen=True)
class Matrix:
    """E stacked weights [O, I] in a backend's own layout; made by `Ops.pack`.

    paired: the rows of two matrices of O/2 rows each, gates and ups, which the layout brings together.
    """

    data: Tensor
    format: WeightFormat
    num_matrices: int
    rows: int
    cols: int
    paired: bool = False


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
class HeadShape:
    """Query heads N, KV heads M, and the dimension D of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Rope:
    """cos and sin tables of the rotary embedding, see `rope_tables`."""

    cos_LD: Tensor
    sin_LD: Tensor


@dataclass(frozen=True)
class StepBatch:
    """The tokens of a step, which sequence each belongs to, and where its KV lives.

    Row r covers the tokens [query_starts_R1[r], query_starts_R1[r + 1]) of the step, which are the
    last ones of a context of context_lens_R[r] tokens (their own KV included). Token j of the
    context lies in block block_tables_RB[r, j // block_size] at offset j % block_size; entries behind
    the context's last block mean nothing. slots_T says the same of the step's own tokens, as
    block * block_size + offset. selected_S: the tokens whose logits are wanted.

    Example: block size 16, one row that decodes its 18th token from blocks 7 and 2:
    query_starts [0, 1], context_lens [18], block_tables [[7, 2]], positions [17], slots [33].
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts_R1: Tensor
    context_lens_R: Tensor
    block_tables_RB: Tensor
    block_size: int
    selected_S: Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of R rows, as tensors. Units and order as in `Ops.sample`.

    filters_R5: float64 columns temperature, top_k, top_p, min_p, and a uniform number in [0, 1).
    penalty_rows: rows with any penalty; the two token lists below belong to them, in order.
    generated_tokens, context_tokens: per penalty row, the ids generated so far, and all ids so far.
    """

    filters_R5: Tensor
    penalty_rows: list[int]
    presence: list[float]
    frequency: list[float]
    repetition: list[float]
    generated_tokens: list[Tensor]
    context_tokens: list[Tensor]


class Ops(Protocol):
    """The functions of a backend."""

    def pack(self, weight_EOI: Tensor, weight_format: WeightFormat, *, paired: bool = False) -> Matrix:
        """A float weight [O, I] or [E, O, I] in the layout and format that the products below read.

        int8: symmetric, int4: with a zero point; both in groups of 32 inputs with a float16 scale.
        """

    def allocate_kv(self, num_blocks: int, block_size: int, shape: HeadShape, dtype: torch.dtype) -> KVCache:
        """Room for the KV of one layer; its content is undefined."""

    def plan_step(self, batch: StepBatch) -> object:
        """What the functions that take a plan can prepare once per step and reuse in every layer."""

    def embed(self, table: Matrix, plan: object) -> Tensor:
        """Rows of the [V, H] table, one for each token of the step."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def layer_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight, without bias (arXiv 1607.06450)."""

    def linear(self, x_TI: Tensor, weight: Matrix) -> Tensor:
        """x @ weight.T. int8 weights meet x rounded to 13 bits, int4 ones to 8, in groups of 32."""

    def attention(
        self, qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, shape: HeadShape, scale: float
    ) -> Tensor:
        """Turn q and k, store k and v, and attend; [T, (N + 2M) D] to [T, N * D].

        Rotary embedding in the half-rotation layout (arXiv 2104.09864). Attention is causal, of every
        token over its own sequence's cached KV; query head n reads KV head n // (N / M) (arXiv
        2305.13245). qkv may be overwritten.
        """

    def route(self, x_TH: Tensor, router: Matrix, spec: RouterSpec) -> Routing:
        """Choose experts for every token by the logits x @ router.T; the router is float32."""

    def experts(
        self, x_TH: Tensor, routing: Routing, gate_up: Matrix, down: Matrix, activation: Activation
    ) -> Tensor:
        """Sum over the chosen experts of weight * down(act(gate(x)) * up(x)), in slot order.

        gate_up is a paired stack [E, 2F, H] with gate rows first, down a stack [E, H, F]. Only chosen
        experts are computed, each once for all of its tokens.
        """

    def add(self, x_TH: Tensor, y_TH: Tensor) -> Tensor:
        """x + y; y may be overwritten."""

    def select(self, x_TH: Tensor, plan: object) -> Tensor:
        """The rows [S, H] of the step's selected tokens."""

    def sample(self, logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
        """Next token ids [R]: penalties, temperature, top_k, top_p, min_p, inverse-CDF draw.

        The uniform number is the row's only randomness. Temperature 0 takes the largest logit after
        penalties, the lowest id among equals. A row whose logits are not numbers gets -1.
        """


def rope_tables(length: int, head_dim: int, theta: float) -> Rope:
    """cos and sin of position * theta^(-2i/D) for i < D/2, float32, each [length, D/2]."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    return Rope(angles.cos(), angles.sin())
