"""Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B (arXiv 2407.10671).

Reference implementation: transformers' Qwen2MoeForCausalLM. Softmax over all experts, top-k, not
renormalised; besides, every token visits a shared expert, which a sigmoid gate weighs. Biases on q, k and v.
Some layers may be dense. Sliding windows are refused: no published model has them, and releases of
transformers differ on which layers they are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.feed_forward import FeedForward
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
from toptwo.models.weight_specs import (
    ExpertNames,
    ExpertSize,
    attention_specs,
    expert_specs,
    mlp_specs,
    whole,
)
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo.moe.shared import GatedExpert, SharedMoELayer
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights


@dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(DecoderConfig):
    """The shape of a Qwen2-MoE. sparse_layers: those with experts; the others are dense and `ffn_size` wide.
    renormalize: the weights of a token's experts add up to 1."""

    sparse_layers: frozenset[int]
    ffn_size: int
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    shared_ffn_size: int
    renormalize: bool
    qkv_bias: bool


def read_config(raw: Mapping[str, object]) -> Qwen2MoeConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    fields.require("use_sliding_window", False)
    num_experts = fields.integer("num_experts", 60)
    shared = read_decoder(fields, "qwen2_moe", max_position=32_768)
    return Qwen2MoeConfig(
        **shared,
        sparse_layers=read_sparse_layers(fields, shared["num_layers"]),
        ffn_size=fields.integer("intermediate_size", 5632),
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 4, high=num_experts),
        expert_ffn_size=fields.integer("moe_intermediate_size", 1408),
        shared_ffn_size=fields.integer("shared_expert_intermediate_size", 5632),
        renormalize=fields.flag("norm_topk_prob", False),
        qkv_bias=fields.flag("qkv_bias", True),
    )


def read_sparse_layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer has experts, but for the `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", 1)
    return frozenset(range(step - 1, num_layers, step)) - set(fields.integers("mlp_only_layers"))


def weight_map(config: Qwen2MoeConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: Qwen2MoeConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    sparse = layer in config.sparse_layers
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, attention, config.heads, hidden, qkv_bias=config.qkv_bias),
        whole(f"{ours}.mlp_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        *(_moe_map(config, ours, mlp) if sparse else mlp_specs(ours, mlp, config.ffn_size, hidden)),
    ]


def _moe_map(config: Qwen2MoeConfig, ours: str, source: str) -> list[WeightSpec]:
    hidden, experts, shared = config.hidden_size, f"{source}.experts", f"{source}.shared_expert"
    return [
        whole(f"{ours}.router", (config.num_experts, hidden), "router", f"{source}.gate.weight"),
        *expert_specs(
            ours,
            ExpertSize(config.num_experts, config.expert_ffn_size, hidden),
            ExpertNames(experts),
            fused=(f"{experts}.gate_up_proj", f"{experts}.down_proj"),
        ),
        *mlp_specs(f"{ours}.shared", shared, config.shared_ffn_size, hidden),
        whole(f"{ours}.shared.gate", (1, hidden), "router", f"{shared}_gate.weight", view=_as_row),
    ]


def _as_row(gate: Tensor) -> Tensor:
    """The shared expert's gate, which some converters write as a vector."""
    return gate.reshape(1, -1)


def ignored_tensors(config: Qwen2MoeConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: Qwen2MoeConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: Qwen2MoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    vectors, mlp = weights.vectors, _expert_weights(weights)
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["mlp_norm"], config.norm_eps, ops),
        feed_forward=_build_moe(config, weights, ops)
        if layer in config.sparse_layers
        else FeedForward(mlp, ops),
        ops=ops,
    )


def _build_moe(config: Qwen2MoeConfig, weights: Weights, ops: Ops) -> SharedMoELayer:
    shared = weights.under("shared")
    spec = RouterSpec(config.num_experts, config.experts_per_token, renormalize=config.renormalize)
    weigh = RouterSpec(1, 1, score="sigmoid", renormalize=False)
    return SharedMoELayer(
        moe=MoELayer(
            router=Router(RouterWeights(weights.matrices["router"]), spec, ops),
            experts=Experts(_expert_weights(weights), ops),
        ),
        shared=GatedExpert(
            gate=Router(RouterWeights(shared.matrices["gate"]), weigh, ops),
            expert=Experts(_expert_weights(shared), ops),
        ),
        ops=ops,
    )


def _expert_weights(weights: Weights) -> ExpertWeights:
    return ExpertWeights(weights.matrices["gate_up"], weights.matrices["down"])
