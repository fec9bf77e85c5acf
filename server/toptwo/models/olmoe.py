"""OLMoE-1B-7B (arXiv 2409.02060).

Reference implementation: transformers' OlmoeForCausalLM. Softmax over all experts, top-k, not renormalised.
Queries and keys are normalised over all heads together, not each head for itself; what comes out, and the
values, may be cut off at `clip_qkv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toptwo.layers.attention import Attention, ClippedQKV
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
from toptwo.models.weight_specs import (
    ExpertNames,
    ExpertSize,
    attention_specs,
    expert_specs,
    qk_norm_specs,
    whole,
)
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights


@dataclass(frozen=True, kw_only=True)
class OlmoeConfig(DecoderConfig):
    """The shape of an OLMoE. renormalize: the weights of a token's experts add up to 1. attention_bias: all
    four projections have one. clip_qkv: bound of queries, keys and values; None for none."""

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    renormalize: bool
    attention_bias: bool
    clip_qkv: float | None


def read_config(raw: Mapping[str, object]) -> OlmoeConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    num_experts = fields.integer("num_experts", 64)
    return OlmoeConfig(
        **read_decoder(fields, "olmoe", max_position=4096, norm_eps=1e-5),
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 8, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        renormalize=fields.flag("norm_topk_prob", False),
        attention_bias=fields.flag("attention_bias", False),
        clip_qkv=fields.number("clip_qkv") if fields.has("clip_qkv") else None,
    )


def weight_map(config: OlmoeConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: OlmoeConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    attention, experts = f"{source}.self_attn", f"{source}.mlp.experts"
    heads, bias = config.heads, config.attention_bias
    q_width, k_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, attention, heads, hidden, qkv_bias=bias, out_bias=bias),
        *qk_norm_specs(ours, attention, q_width, k_width),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", f"{source}.mlp.gate.weight"),
        *expert_specs(
            ours,
            ExpertSize(config.num_experts, config.expert_ffn_size, hidden),
            ExpertNames(experts),
            fused=(f"{experts}.gate_up_proj", f"{experts}.down_proj"),
        ),
    ]


def ignored_tensors(config: OlmoeConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: OlmoeConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: OlmoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    spec = RouterSpec(config.num_experts, config.experts_per_token, renormalize=config.renormalize)
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=_build_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["moe_norm"], config.norm_eps, ops),
        feed_forward=MoELayer(
            router=Router(RouterWeights(matrices["router"]), spec, ops),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ),
        ops=ops,
    )


def _build_attention(config: OlmoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> Attention:
    attention = build_normed_attention(config, weights, layer, rope, ops)
    if config.clip_qkv is None:
        return attention
    return replace(attention, qkv=ClippedQKV(attention.qkv, config.clip_qkv, ops))
