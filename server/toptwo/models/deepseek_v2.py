"""DeepSeek-V2, V2-Lite, V2.5 and Coder-V2 (arXiv 2405.04434).

Reference implementation: transformers' DeepseekV2ForCausalLM. What is odd about it: attention over latent
vectors (layers/mla.py), whose turned dimensions are neighbours in the checkpoint; the first layers dense;
shared experts beside the chosen ones; experts that may be chosen out of the best groups only.

`norm_topk_prob` is what DeepSeek's own code makes of it: the chosen weights are either renormalised or
scaled. transformers 5 only ever scales. All released models say false, where both agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toptwo.layers.feed_forward import FeedForward
from toptwo.layers.linear import Linear
from toptwo.layers.mla import LatentAttention, LowRankQuery
from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Piece, Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    build_frame,
    build_layers,
    frame_specs,
    ignored_head,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.rope import read_rope, read_sharpening
from toptwo.models.weight_specs import ExpertNames, ExpertSize, expert_specs, mlp_specs, whole
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo.moe.shared import SharedMoELayer
from toptwo_kernels.ops import (
    ExpertWeights,
    HeadShape,
    LatentShape,
    LatentSpec,
    Ops,
    Rope,
    RouterSpec,
    RouterWeights,
)

LATENT_EPS = 1e-6  # of the norms inside attention, whatever the config says of the others


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(DecoderConfig):
    """The shape of a DeepSeek-V2 or V3.

    heads: head_dim counts the dimensions that turn, nope_dim those that do not, value_dim those of values.
    query_rank: between the two matrices that make queries; None where one does.
    interleaved: dimensions that turn together are neighbours in the checkpoint.
    ffn_size, expert_ffn_size, shared_ffn_size: of dense layers, of an expert, of all shared experts.
    sparse_layers: those with experts.
    """

    nope_dim: int
    value_dim: int
    latent_dim: int
    query_rank: int | None
    attention_scale: float
    interleaved: bool
    ffn_size: int
    expert_ffn_size: int
    shared_ffn_size: int
    sparse_layers: frozenset[int]
    routing: RouterSpec

    @property
    def kv_shape(self) -> LatentShape:
        """What a layer caches of a token."""
        return LatentShape(self.heads.num_heads, self.latent_dim, self.heads.head_dim)

    @property
    def experts_per_token(self) -> int:
        """Of those that are not for every token."""
        return self.routing.top_k


def read_config(raw: Mapping[str, object]) -> DeepseekConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("scoring_func", "softmax")
    fields.require("topk_method", "greedy", "group_limited_greedy")
    grouped = fields.text("topk_method", "greedy") == "group_limited_greedy"
    renormalize = fields.flag("norm_topk_prob", False)
    routing = read_routing(
        fields,
        renormalize=renormalize,
        scale=1.0 if renormalize else fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.integer("n_group") if grouped else 1,
        top_groups=fields.integer("topk_group") if grouped else 1,
    )
    return DeepseekConfig(**read_shape(fields, "deepseek_v2", max_position=2048), routing=routing)


def read_routing(fields: ConfigFields, **options: Any) -> RouterSpec:
    """options: those of `RouterSpec`. Raises StartupError for groups that cannot be cut so."""
    num_experts = fields.integer("n_routed_experts")
    top_k = fields.integer("num_experts_per_tok", high=num_experts)
    try:
        return RouterSpec(num_experts, top_k, **options)
    except ValueError as error:
        raise fields.error("n_group", f"or topk_group is wrong: {error}") from None


def read_shape(
    fields: ConfigFields, architecture: str, *, max_position: int, interleaved: bool = True
) -> dict[str, Any]:
    """The fields of `DeepseekConfig` but for the routing, which versions differ in."""
    fields.require("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        fields.require(key, False)
    num_heads, num_layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    rope_dim, nope_dim = fields.integer("qk_rope_head_dim"), fields.integer("qk_nope_head_dim")
    if rope_dim % 2:
        raise fields.error("qk_rope_head_dim", f"must be even, not {rope_dim}")
    expert_ffn, every = fields.integer("moe_intermediate_size"), fields.integer("moe_layer_freq", 1)
    first_sparse = fields.integer("first_k_dense_replace", 0, low=0)
    return {
        "architecture": architecture,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": num_layers,
        "heads": HeadShape(num_heads, num_heads, rope_dim),
        "max_position": fields.integer("max_position_embeddings", max_position),
        "rope": read_rope(fields, 10_000.0, rope_dim),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        "nope_dim": nope_dim,
        "value_dim": fields.integer("v_head_dim"),
        "latent_dim": fields.integer("kv_lora_rank"),
        "query_rank": fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None,
        "attention_scale": (nope_dim + rope_dim) ** -0.5 * read_sharpening(fields),
        "interleaved": interleaved,
        "ffn_size": fields.integer("intermediate_size"),
        "expert_ffn_size": expert_ffn,
        "shared_ffn_size": expert_ffn * fields.integer("n_shared_experts"),
        "sparse_layers": frozenset(i for i in range(first_sparse, num_layers) if i % every == 0),
    }


def weight_map(config: DeepseekConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: DeepseekConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    sparse = layer in config.sparse_layers
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *_query_map(config, ours, f"{source}.self_attn"),
        *_latent_map(config, ours, f"{source}.self_attn"),
        whole(f"{ours}.feed_forward_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        *(_moe_map if sparse else _dense_map)(config, ours, f"{source}.mlp"),
    ]


def _query_map(config: DeepseekConfig, ours: str, source: str) -> list[WeightSpec]:
    hidden, rank, heads = config.hidden_size, config.query_rank, config.heads
    rows = heads.num_heads * (config.nope_dim + heads.head_dim)
    view = partial(_halves_turn, num_heads=heads.num_heads, start=config.nope_dim)
    turned = view if config.interleaved else None
    if rank is None:
        return [whole(f"{ours}.query", (rows, hidden), "matrix", f"{source}.q_proj.weight", view=turned)]
    return [
        whole(f"{ours}.query_down", (rank, hidden), "matrix", f"{source}.q_a_proj.weight"),
        whole(f"{ours}.query_norm", (rank,), "vector", f"{source}.q_a_layernorm.weight"),
        whole(f"{ours}.query_up", (rows, rank), "matrix", f"{source}.q_b_proj.weight", view=turned),
    ]


def _latent_map(config: DeepseekConfig, ours: str, source: str) -> list[WeightSpec]:
    hidden, latent, heads = config.hidden_size, config.latent_dim, config.heads
    view = partial(_halves_turn, num_heads=1, start=latent)
    key_shape = heads.num_heads, latent, config.nope_dim
    value_shape = heads.num_heads, config.value_dim, latent
    keys = partial(_key_part, num_heads=heads.num_heads, nope_dim=config.nope_dim)
    values = partial(_value_part, num_heads=heads.num_heads, nope_dim=config.nope_dim)
    both = f"{source}.kv_b_proj.weight"  # newer GGUF files hold its two parts, as they are needed here
    return [
        whole(
            f"{ours}.latent",
            (latent + heads.head_dim, hidden),
            "matrix",
            f"{source}.kv_a_proj_with_mqa.weight",
            view=view if config.interleaved else None,
        ),
        whole(f"{ours}.latent_norm", (latent,), "vector", f"{source}.kv_a_layernorm.weight"),
        WeightSpec(
            f"{ours}.key_up",
            key_shape,
            "matrix",
            ((Piece(both, view=keys),), (Piece(f"{source}.k_b_proj.weight"),)),
        ),
        WeightSpec(
            f"{ours}.value_up",
            value_shape,
            "matrix",
            ((Piece(both, view=values),), (Piece(f"{source}.v_b_proj.weight"),)),
        ),
        whole(
            f"{ours}.out", (hidden, heads.num_heads * config.value_dim), "matrix", f"{source}.o_proj.weight"
        ),
    ]


def _halves_turn(rows: Tensor, num_heads: int, start: int) -> Tensor:
    """The rows of heads whose dimensions from `start` on turn with their neighbours, put so that they turn
    with those half a head further on. Done to queries and keys alike, it changes no product of the two."""
    heads = torch.unflatten(rows, 0, (num_heads, -1))
    end = heads.shape[1]
    order = [*range(start), *range(start, end, 2), *range(start + 1, end, 2)]
    return heads[:, order].flatten(0, 1)


def _key_part(rows: Tensor, num_heads: int, nope_dim: int) -> Tensor:
    """[N (D + V), C] to [N, C, D]."""
    return torch.unflatten(rows, 0, (num_heads, -1))[:, :nope_dim].transpose(1, 2)


def _value_part(rows: Tensor, num_heads: int, nope_dim: int) -> Tensor:
    """[N (D + V), C] to [N, V, C]."""
    return torch.unflatten(rows, 0, (num_heads, -1))[:, nope_dim:]


def _dense_map(config: DeepseekConfig, ours: str, source: str) -> list[WeightSpec]:
    return mlp_specs(ours, source, config.ffn_size, config.hidden_size)


def _moe_map(config: DeepseekConfig, ours: str, source: str) -> list[WeightSpec]:
    hidden, num_experts = config.hidden_size, config.routing.num_experts
    experts = f"{source}.experts"
    return [
        whole(f"{ours}.router", (num_experts, hidden), "router", f"{source}.gate.weight"),
        *expert_specs(
            ours,
            ExpertSize(num_experts, config.expert_ffn_size, hidden),
            ExpertNames(experts),
            fused=(f"{experts}.gate_up_proj", f"{experts}.down_proj"),
        ),
        *mlp_specs(f"{ours}.shared", f"{source}.shared_experts", config.shared_ffn_size, hidden),
    ]


def ignored_tensors(config: DeepseekConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: DeepseekConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: DeepseekConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    vectors, feed_forward = weights.vectors, _build_moe if layer in config.sparse_layers else _build_network
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=_build_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["feed_forward_norm"], config.norm_eps, ops),
        feed_forward=feed_forward(config, weights, ops),
        ops=ops,
    )


def _build_attention(
    config: DeepseekConfig, weights: Weights, layer: int, rope: Rope, ops: Ops
) -> LatentAttention:
    matrices, vectors = weights.matrices, weights.vectors
    query: Linear | LowRankQuery
    if config.query_rank is None:
        query = Linear(matrices["query"], ops)
    else:
        norm = RMSNorm(vectors["query_norm"], LATENT_EPS, ops)
        query = LowRankQuery(Linear(matrices["query_down"], ops), norm, Linear(matrices["query_up"], ops))
    return LatentAttention(
        layer=layer,
        spec=LatentSpec(config.kv_shape, config.attention_scale),
        query=query,
        latent=Linear(matrices["latent"], ops),
        latent_norm=vectors["latent_norm"],
        eps=LATENT_EPS,
        key_up=matrices["key_up"],
        value_up=matrices["value_up"],
        out=Linear(matrices["out"], ops),
        rope=rope,
        ops=ops,
    )


def _build_network(config: DeepseekConfig, weights: Weights, ops: Ops) -> FeedForward:
    return FeedForward(ExpertWeights(weights.matrices["gate_up"], weights.matrices["down"]), ops)


def _build_moe(config: DeepseekConfig, weights: Weights, ops: Ops) -> SharedMoELayer:
    matrices = weights.matrices
    router = RouterWeights(matrices["router"], selection_bias_E=weights.vectors.get("selection_bias"))
    experts = ExpertWeights(matrices["gate_up"], matrices["down"])
    return SharedMoELayer(
        moe=MoELayer(Router(router, config.routing, ops), Experts(experts, ops)),
        shared=_build_network(config, weights.under("shared"), ops),
        ops=ops,
    )
