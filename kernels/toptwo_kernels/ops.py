"""The contract between layers and kernels: what every backend computes, not how.

Shape letters, used in all names: T tokens of a step, R rows (sequences) of a step, S tokens selected
for logits, L context length, B KV blocks, H hidden, E experts, K experts chosen per token, F expert FFN
width, V vocabulary, N query heads, M KV heads, D head dimension, C latent dimension, I/O in and out
features, W and X any number of columns.

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

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""How a feed-forward network joins its halves: silu(gate) * up (arXiv 2002.05202); the same with GELU in its
tanh form; and gate * sigmoid(1.702 gate) * (up + 1), gate at most `limit` and up within it (gpt-oss)."""
ScoreFunction = Literal["softmax", "sigmoid", "sparsemixer"]
GroupScore = Literal["best", "best_two"]
WeightFormat = Literal["float32", "bfloat16", "float16", "int8", "int4", "fp8"]
QUANTIZED: tuple[WeightFormat, ...] = ("int8", "int4")
GROUP = 32  # consecutive inputs that share a scale in the quantised formats

KVCache = tuple[Tensor, ...]
"""What one layer keeps of every token, in a layout that only the backend knows."""


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

    top_k: experts chosen per token; all of them is dense gating, where nothing is left out.
    score: function from logits to scores. "sparsemixer" (arXiv 2409.12136) takes two experts, each with its
        weight of a softmax over the logits that are within `jitter` of the largest left; it says what
        the weights are, so nothing is renormalised.
    over_selected: apply `score` to the chosen logits only (Mistral's own code) instead of to all.
    renormalize: divide the chosen scores by their sum.
    scale: factor on the final weights.
    num_groups, top_groups: experts lie in equal groups, of which the best few may be chosen from.
    group_score: a group is as good as its best expert (DeepSeek-V2) or its best two together (V3).

    Ties go to the lowest expert id, and to the lowest group. Scores are computed in float32.
    """

    num_experts: int
    top_k: int
    score: ScoreFunction = "softmax"
    over_selected: bool = False
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "best"
    jitter: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and {self.num_experts} experts, not {self.top_k}")
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"{self.top_groups} of {self.num_groups} groups: {self.num_experts} experts cannot be cut so"
            )
        if self.top_groups * (self.num_experts // self.num_groups) < self.top_k:
            raise ValueError(f"{self.top_groups} groups do not hold {self.top_k} experts")
        if self.group_score == "best_two" and self.num_experts < 2 * self.num_groups:
            raise ValueError("a group scored by its best two experts holds at least two")
        if self.score == "sparsemixer" and (self.top_k != 2 or self.over_selected or self.num_groups > 1):
            raise ValueError("sparsemixer chooses two experts out of all")


@dataclass(frozen=True)
class RouterWeights:
    """logits = x @ matrix.T + logit_bias, in float32; selection_bias is added to the scores for the choice
    alone and is not in the weights (arXiv 2408.15664)."""

    matrix: Matrix
    logit_bias_E: Tensor | None = None
    selection_bias_E: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The choice of experts: logical expert ids and their float32 weights, best first.

    counts_E: int64, to which `experts` adds how many tokens came to each expert; None to count nowhere.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """E gated feed-forward networks, down(activation(gate(x), up(x))), in one format.

    gate_up is a paired stack [E, 2F, H] with the gate rows first, down a stack [E, H, F]; biases are float32
    and in the same order. limit: of "clamped_swiglu".
    """

    gate_up: Matrix
    down: Matrix
    activation: Activation = "silu"
    gate_up_bias_EF: Tensor | None = None
    down_bias_EH: Tensor | None = None
    limit: float = 7.0


@dataclass(frozen=True)
class HeadShape:
    """Query heads N, KV heads M, and the dimension D of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def kv_size(self) -> int:
        """Numbers that one layer keeps of a token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentShape:
    """Query heads N that share, per token, a latent vector of C numbers and a turned key of R."""

    num_heads: int
    latent_dim: int
    rope_dim: int

    @property
    def kv_size(self) -> int:
        """Numbers that one layer keeps of a token."""
        return self.latent_dim + self.rope_dim


KVShape = HeadShape | LatentShape


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends.

    scale: factor on q . k.
    window: how many tokens a query sees, itself included; None for all before it.
    soft_cap: a score s becomes soft_cap * tanh(s / soft_cap).
    sinks_N: per query head a score without a value, which takes its part of the softmax (gpt-oss).
    """

    shape: HeadShape
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_N: Tensor | None = None


@dataclass(frozen=True)
class LatentSpec:
    """How a layer attends to latent vectors; scale: factor on q . k."""

    shape: LatentShape
    scale: float


@dataclass(frozen=True)
class Rope:
    """cos and sin of the rotary embedding, float32 [length, D/2]; a head's first D dimensions turn."""

    cos_LD: Tensor
    sin_LD: Tensor


@dataclass(frozen=True)
class StepBatch:
    """The tokens of a step, which sequence each belongs to, and where its KV lives.

    Row r covers the tokens [query_starts_R1[r], query_starts_R1[r + 1]) of the step, which are the
    last ones of a context of context_lens_R[r] tokens (their own KV included). Token j of the
    context lies in block block_tables_RB[r, j // block_size] at offset j % block_size; entries behind
    the context's last block mean nothing. slots_T says the same of the step's own tokens, as
    block * block_size + offset. selected_S: the tokens whose logits are wanted. drawn_R: what the step
    before this one has drawn, if the host does not know it yet; an id -1 - i stands for drawn_R[i]. Only
    backends that run steps by themselves are given it.

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
    drawn_R: Tensor | None = None


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
        fp8: e4m3 with a float32 scale per block of 128 outputs and 128 inputs (DeepSeek-V3), where gates and
        ups are blocks of their own. Raises ValueError for a format that the backend does not have.
        """

    def allocate_kv(self, num_blocks: int, block_size: int, shape: KVShape, dtype: torch.dtype) -> KVCache:
        """Room for what one layer keeps; its content is undefined."""

    def plan_step(self, batch: StepBatch) -> object:
        """What the functions that take a plan can prepare once per step and reuse in every layer."""

    def embed(self, table: Matrix, plan: object) -> Tensor:
        """Rows of the [V, H] table, one for each token of the step."""

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def layer_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float, bias_H: Tensor | None = None) -> Tensor:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450)."""

    def norm_slices(self, x_TX: Tensor, weight_W: Tensor, eps: float, first: int, count: int) -> Tensor:
        """x with `count` consecutive slices of W columns from column `first` on replaced by their rms_norm,
        each for itself. x may be overwritten."""

    def linear(self, x_TI: Tensor, weight: Matrix, bias_O: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias. int8 weights meet x rounded to 13 bits, int4 ones to 8, in groups of 32."""

    def linear_per_head(self, x_TX: Tensor, weight: Matrix) -> Tensor:
        """A stack [N, O, I] applied to the N heads that x's columns consist of, each matrix to its own head.

        A head wider than I is passed on behind the product, so that [T, N (I + R)] becomes [T, N (O + R)].
        x is rounded as by `linear`.
        """

    def attention(self, qkv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: AttentionSpec) -> Tensor:
        """Turn q and k, store k and v, and attend; [T, (N + 2M) D] to [T, N * D].

        Rotary embedding in the half-rotation layout (arXiv 2104.09864). Attention is causal, of every
        token over its own sequence's cached KV; query head n reads KV head n // (N / M) (arXiv
        2305.13245). qkv may be overwritten.
        """

    def latent_attention(
        self, q_TX: Tensor, kv_TX: Tensor, rope: Rope, kv: KVCache, plan: object, spec: LatentSpec
    ) -> Tensor:
        """Attention in the space of the latent vectors (multi-head latent attention, arXiv 2405.04434).

        A row of q holds N heads of C + R numbers, a row of kv one latent vector of C and a key of R. The R
        ones are turned as by `attention`; a score is the product of all C + R, and what is summed up are the
        latent vectors: [T, N * C]. Both inputs may be overwritten.
        """

    def route(self, x_TH: Tensor, router: RouterWeights, spec: RouterSpec) -> Routing:
        """Choose experts for every token; the router's matrix is float32."""

    def experts(self, x_TH: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        """Sum of the chosen experts' outputs times their weights, in slot order.

        Only chosen experts are computed, each once for all of its tokens. What came to each is added to the
        routing's counts.
        """

    def add(self, x_TH: Tensor, y_TH: Tensor) -> Tensor:
        """x + y; y may be overwritten."""

    def scale(self, x_TH: Tensor, factor: float) -> Tensor:
        """x * factor; x may be overwritten."""

    def clamp(self, x_TH: Tensor, limit: float) -> Tensor:
        """x cut off at -limit and limit; x may be overwritten."""

    def select(self, x_TH: Tensor, plan: object) -> Tensor:
        """The rows [S, H] of the step's selected tokens."""

    def sample(self, logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
        """Next token ids [R]: penalties, temperature, top_k, top_p, min_p, inverse-CDF draw.

        The uniform number is the row's only randomness. Temperature 0 takes the largest logit after
        penalties, the lowest id among equals. A row whose logits are not numbers gets -1.
        """
