"""DBRX (Databricks, March 2024): 16 experts of which 4 are chosen.

Reference implementation: transformers' DbrxForCausalLM, but for the base of the rotary embedding: it stands
in `attn_config`, and transformers 5 reads and writes its own default of 10,000 beside it instead. Odd:
queries, keys and values come out of one matrix and are cut off before they turn; norms are LayerNorms without
bias; experts are stacked row by row in tensors whose names have no ".weight", the last one transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from toptwo.layers.attention import Attention, ClippedQKV
from toptwo.layers.embedding import Embedding
from toptwo.layers.linear import Linear
from toptwo.layers.norm import LayerNorm
from toptwo.models.checkpoint import Piece, Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    build_attention,
    build_layers,
    layer_specs,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.rope import read_rope
from toptwo.models.weight_specs import ExpertNames, ExpertSize, expert_specs, joined_rows, whole
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, HeadShape, Ops, Rope, RouterSpec, RouterWeights

NORM_EPS = 1e-5  # in no config


@dataclass(frozen=True, kw_only=True)
class DbrxConfig(DecoderConfig):
    """The shape of a DBRX. clip_qkv: where queries, keys and values are cut off; None for nowhere."""

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    clip_qkv: float | None


def read_config(raw: Mapping[str, object]) -> DbrxConfig:
    """See `registry.Architecture.read_config`."""
    fields = ConfigFields(raw)
    fields.require("tie_word_embeddings", False)
    attention, ffn = fields.section("attn_config"), fields.section("ffn_config")
    ffn.require("moe_normalize_expert_weights", 1)  # the norm that the chosen weights are divided by
    ffn.section("ffn_act_fn").require("name", "silu")
    hidden, heads = fields.integer("d_model"), _read_heads(fields, attention)
    rope = read_rope(fields, 10_000.0, heads.head_dim)
    num_experts = ffn.integer("moe_num_experts", 4)
    return DbrxConfig(
        architecture="dbrx",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("n_layers"),
        heads=heads,
        max_position=fields.integer("max_seq_len", 2048),
        rope=replace(rope, theta=attention.number("rope_theta", rope.theta)),
        norm_eps=NORM_EPS,
        tied_embeddings=False,
        num_experts=num_experts,
        experts_per_token=ffn.integer("moe_top_k", 1, high=num_experts),
        expert_ffn_size=ffn.integer("ffn_hidden_size", 3584),
        clip_qkv=attention.number("clip_qkv") if attention.has("clip_qkv") else None,
    )


def _read_heads(fields: ConfigFields, attention: ConfigFields) -> HeadShape:
    hidden, num_heads = fields.integer("d_model"), fields.integer("n_heads")
    if hidden % (2 * num_heads):
        raise fields.error("n_heads", f"must divide d_model ({hidden}) into even parts")
    heads = HeadShape(num_heads, attention.integer("kv_n_heads", 1), hidden // num_heads)
    if num_heads % heads.num_kv_heads:
        raise attention.error("kv_n_heads", f"must divide n_heads ({num_heads})")
    return heads


def weight_map(config: DbrxConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    vocabulary = config.vocab_size, config.hidden_size
    return [
        whole("embed", vocabulary, "head", "transformer.wte.weight"),
        *layer_specs(config, _layer_map),
        whole("norm", (config.hidden_size,), "vector", "transformer.norm_f.weight"),
        whole("lm_head", vocabulary, "head", "lm_head.weight"),
    ]


def _layer_map(config: DbrxConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"transformer.blocks.{layer}", f"layers.{layer}"
    norms, attention, ffn = f"{source}.norm_attn_norm", f"{source}.norm_attn_norm.attn", f"{source}.ffn"
    kv_rows = config.heads.num_kv_heads * config.heads.head_dim
    rows = [
        (f"{attention}.q_proj", hidden),
        (f"{attention}.k_proj", kv_rows),
        (f"{attention}.v_proj", kv_rows),
    ]
    together, apart = (Piece(f"{attention}.Wqkv.weight"),), joined_rows(rows, ".weight")
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{norms}.norm_1.weight"),
        WeightSpec(f"{ours}.qkv", (hidden + 2 * kv_rows, hidden), "matrix", (together, apart)),
        whole(f"{ours}.out", (hidden, hidden), "matrix", f"{attention}.out_proj.weight"),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{norms}.norm_2.weight"),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", f"{ffn}.router.layer.weight"),
        *_expert_map(config, ours, f"{ffn}.experts.mlp"),
    ]


def _expert_map(config: DbrxConfig, ours: str, mlp: str) -> list[WeightSpec]:
    """Experts as Databricks stacks them, or taken apart by others. w1 is the gate, v1 is up, w2 is down."""
    size = ExpertSize(config.num_experts, config.expert_ffn_size, config.hidden_size)

    def by_expert(weight: Tensor) -> Tensor:
        return weight.view(size.num_experts, size.ffn_size, size.hidden_size)

    def turned(weight: Tensor) -> Tensor:
        return by_expert(weight).transpose(1, 2)

    gates, ups = slice(0, size.ffn_size), slice(size.ffn_size, None)
    gate_up, down = expert_specs(ours, size, ExpertNames(mlp, "w1", "v1", "w2"))
    stacked = (
        Piece(f"{mlp}.w1", (slice(None), gates), by_expert),
        Piece(f"{mlp}.v1", (slice(None), ups), by_expert),
    )
    return [
        replace(gate_up, sources=(stacked, *gate_up.sources)),
        replace(down, sources=((Piece(f"{mlp}.w2", view=turned),), *down.sources)),
    ]


def ignored_tensors(config: DbrxConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return []


def build(config: DbrxConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    return Decoder(
        embed=Embedding(weights.matrices["embed"], ops),
        layers=build_layers(config, weights, max_len, ops, _build_layer),
        norm=LayerNorm(weights.vectors["norm"], config.norm_eps, ops),
        lm_head=Linear(weights.matrices["lm_head"], ops),
    )


def _build_layer(config: DbrxConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    return DecoderLayer(
        attention_norm=LayerNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=_build_attention(config, weights, layer, rope, ops),
        feed_forward_norm=LayerNorm(vectors["moe_norm"], config.norm_eps, ops),
        feed_forward=MoELayer(
            router=Router(
                RouterWeights(matrices["router"]),
                RouterSpec(config.num_experts, config.experts_per_token),
                ops,
            ),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ),
        ops=ops,
    )


def _build_attention(config: DbrxConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> Attention:
    attention = build_attention(config, weights, layer, rope, ops)
    if config.clip_qkv is None:
        return attention
    return replace(attention, qkv=ClippedQKV(attention.qkv, config.clip_qkv, ops))
