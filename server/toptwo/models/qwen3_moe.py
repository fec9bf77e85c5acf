"""Qwen3-MoE: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder (arXiv 2505.09388).

Reference implementation: transformers' Qwen3MoeForCausalLM. Softmax over all experts, top-k, renormalised if
the config says so; every query and key head is normalised before it turns; the head dimension is the config's
own. Some layers may be dense. Sliding windows are refused: no published model has them, and releases of
transformers differ on which layers they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toptwo.layers.feed_forward import FeedForward
from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    build_frame,
    build_layers,
    build_normed_attention,
    frame_specs,
    ignored_head,
    read_decoder,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.qwen2_moe import read_sparse_layers
from toptwo.models.weight_specs import (
    ExpertNames,
    ExpertSize,
    attention_specs,
    expert_specs,
    mlp_specs,
    qk_norm_specs,
    whole,
)
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """The shape of a Qwen3-MoE. sparse_layers: those with experts; the others are dense and `ffn_size` wide.
    renormalize: the weights of a token's experts add up to 1. attention_bias: all four projections have
    one."""

    sparse_layers: frozenset[int]
    ffn_size: int
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    renormalize: bool
    attention_bias: bool


def read_config(raw: Mapping[str, object]) -> Qwen3MoeConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    fields.require("use_sliding_window", False)
    # transformers 5 came to write them under Mixtral's name.
    num_experts = fields.integer("num_experts" if fields.has("num_experts") else "num_local_experts", 128)
    shared = read_decoder(fields, "qwen3_moe", max_position=32_768)
    return Qwen3MoeConfig(
        **shared,
        sparse_layers=read_sparse_layers(fields, shared["num_layers"]),
        ffn_size=fields.integer("intermediate_size", 6144),
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 8, high=num_experts),
        expert_ffn_size=fields.integer("moe_intermediate_size", 768),
        renormalize=fields.flag("norm_topk_prob", False),
        attention_bias=fields.flag("attention_bias", False),
    )


def weight_map(config: Qwen3MoeConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: Qwen3MoeConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    bias, head, sparse = config.attention_bias, config.heads.head_dim, layer in config.sparse_layers
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, attention, config.heads, hidden, qkv_bias=bias, out_bias=bias),
        *qk_norm_specs(ours, attention, head, head),
        whole(f"{ours}.mlp_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        *(_moe_map(config, ours, mlp) if sparse else mlp_specs(ours, mlp, config.ffn_size, hidden)),
    ]


def _moe_map(config: Qwen3MoeConfig, ours: str, source: str) -> list[WeightSpec]:
    hidden, experts = config.hidden_size, f"{source}.experts"
    return [
        whole(f"{ours}.router", (config.num_experts, hidden), "router", f"{source}.gate.weight"),
        *expert_specs(
            ours,
            ExpertSize(config.num_experts, config.expert_ffn_size, hidden),
            ExpertNames(experts),
            fused=(f"{experts}.gate_up_proj", f"{experts}.down_proj"),
        ),
    ]


def ignored_tensors(config: Qwen3MoeConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: Qwen3MoeConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: Qwen3MoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    vectors = weights.vectors
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_normed_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["mlp_norm"], config.norm_eps, ops),
        feed_forward=_build_feed_forward(config, weights, layer, ops),
        ops=ops,
    )


def _build_feed_forward(
    config: Qwen3MoeConfig, weights: Weights, layer: int, ops: Ops
) -> MoELayer | FeedForward:
    matrices = weights.matrices
    experts = ExpertWeights(matrices["gate_up"], matrices["down"])
    if layer not in config.sparse_layers:
        return FeedForward(experts, ops)
    spec = RouterSpec(config.num_experts, config.experts_per_token, renormalize=config.renormalize)
    return MoELayer(Router(RouterWeights(matrices["router"]), spec, ops), Experts(experts, ops))
