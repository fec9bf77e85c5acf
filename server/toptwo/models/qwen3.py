"""Qwen3, dense: 0.6B to 32B (arXiv 2505.09388). The Mixture of Experts that has a single expert.

Reference implementation: transformers' Qwen3ForCausalLM. Every query and key head is normalised before it
turns; the head dimension is the config's own. Sliding windows, which no published model has, are refused.
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
from toptwo.models.weight_specs import attention_specs, mlp_specs, qk_norm_specs, whole
from toptwo_kernels.ops import ExpertWeights, Ops, Rope


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """The shape of a Qwen3. attention_bias: all four projections have one."""

    ffn_size: int
    attention_bias: bool

    @property
    def experts_per_token(self) -> int:
        """The only one that a dense layer has."""
        return 1


def read_config(raw: Mapping[str, object]) -> Qwen3Config:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields({"head_dim": 128, **raw})  # whatever the hidden size
    fields.require("hidden_act", "silu")
    fields.require("use_sliding_window", False)
    return Qwen3Config(
        **read_decoder(fields, "qwen3", max_position=32_768),
        ffn_size=fields.integer("intermediate_size"),
        attention_bias=fields.flag("attention_bias", False),
    )


def weight_map(config: Qwen3Config) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: Qwen3Config, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    attention, bias, head = f"{source}.self_attn", config.attention_bias, config.heads.head_dim
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, attention, config.heads, hidden, qkv_bias=bias, out_bias=bias),
        *qk_norm_specs(ours, attention, head, head),
        whole(f"{ours}.mlp_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        *mlp_specs(ours, f"{source}.mlp", config.ffn_size, hidden),
    ]


def ignored_tensors(config: Qwen3Config) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: Qwen3Config, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: Qwen3Config, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_normed_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["mlp_norm"], config.norm_eps, ops),
        feed_forward=FeedForward(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ops=ops,
    )
