"""Llama (arXiv 2307.09288, 2407.21783): dense, the Mixture of Experts that has a single expert.

Reference implementation: transformers' LlamaForCausalLM. Here for comparison, and because it is what many
mixtures are grown from.
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
    build_attention,
    build_frame,
    build_layers,
    frame_specs,
    ignored_head,
    read_decoder,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.weight_specs import attention_specs, mlp_specs, whole
from toptwo_kernels.ops import ExpertWeights, Ops, Rope


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a Llama. attention_bias: all four projections have one."""

    ffn_size: int
    attention_bias: bool

    @property
    def experts_per_token(self) -> int:
        """The only one that a dense layer has."""
        return 1


def read_config(raw: Mapping[str, object]) -> LlamaConfig:
    """See `registry.Architecture.read_config`."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    fields.require("mlp_bias", False)
    return LlamaConfig(
        **read_decoder(fields, "llama", max_position=2048),
        ffn_size=fields.integer("intermediate_size"),
        attention_bias=fields.flag("attention_bias", False),
    )


def weight_map(config: LlamaConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: LlamaConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    bias = config.attention_bias
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, f"{source}.self_attn", config.heads, hidden, qkv_bias=bias, out_bias=bias),
        whole(f"{ours}.mlp_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        *mlp_specs(ours, f"{source}.mlp", config.ffn_size, hidden),
    ]


def ignored_tensors(config: LlamaConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: LlamaConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: LlamaConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_attention(config, weights, layer, rope, ops),
        feed_forward_norm=RMSNorm(vectors["mlp_norm"], config.norm_eps, ops),
        feed_forward=FeedForward(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ops=ops,
    )
