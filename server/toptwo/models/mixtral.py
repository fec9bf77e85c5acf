"""Mixtral 8x7B, 8x22B and everything built like them (arXiv 2401.04088).

Reference implementation: transformers' MixtralForCausalLM. Softmax over all experts, top-k,
renormalised; rotary embedding in the half-rotation layout; no biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    build_attention,
    build_frame,
    build_layers,
    frame_specs,
    ignored_head,
    read_decoder,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.weight_specs import ExpertNames, ExpertSize, attention_specs, expert_specs, whole
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(DecoderConfig):
    """The shape of a Mixtral. sliding_window: how many tokens each one sees; None for all."""

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    sliding_window: int | None


def read_config(raw: Mapping[str, object]) -> MixtralConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    num_experts = fields.integer("num_local_experts", 8)
    shared = read_decoder(fields, "mixtral", max_position=131_072, rope_theta=1e6, norm_eps=1e-5)
    window = fields.integer("sliding_window") if fields.has("sliding_window") else shared["max_position"]
    return MixtralConfig(
        **shared,
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 2, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        sliding_window=window if window < shared["max_position"] else None,
    )


def weight_map(config: MixtralConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: MixtralConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    moe, fused = f"{source}.block_sparse_moe", f"{source}.mlp.experts"
    size = ExpertSize(config.num_experts, config.expert_ffn_size, hidden)
    routers = f"{moe}.gate.weight", f"{source}.mlp.gate.weight"
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, f"{source}.self_attn", config.heads, hidden),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", *routers),
        # w1 is the gate and w3 is up; w2 is down. transformers 5 stacks them, experts first.
        *expert_specs(
            ours,
            size,
            ExpertNames(f"{moe}.experts", "w1", "w3", "w2"),
            fused=(f"{fused}.gate_up_proj", f"{fused}.down_proj"),
        ),
    ]


def ignored_tensors(config: MixtralConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: MixtralConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: MixtralConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    spec = RouterSpec(config.num_experts, config.experts_per_token)
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_attention(config, weights, layer, rope, ops, window=config.sliding_window),
        feed_forward_norm=RMSNorm(vectors["moe_norm"], config.norm_eps, ops),
        feed_forward=MoELayer(
            router=Router(RouterWeights(matrices["router"]), spec, ops),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ),
        ops=ops,
    )
