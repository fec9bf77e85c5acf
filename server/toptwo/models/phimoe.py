"""Phi-3.5-MoE (arXiv 2404.14219).

Reference implementation: transformers' PhimoeForCausalLM, but for long contexts: it takes the short factors
of the rotary embedding whatever the length, where Microsoft's own code takes the long ones beyond the
original context. Odd: SparseMixer chooses two experts one after the other, each with its weight of a softmax
over those that come near it (arXiv 2409.12136); norms have biases and take the mean away; attention and head
have biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toptwo.layers.embedding import Embedding
from toptwo.layers.linear import Linear
from toptwo.layers.norm import LayerNorm
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    DecoderLayer,
    build_attention,
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

EXPERTS_PER_TOKEN = 2  # SparseMixer knows no other number


@dataclass(frozen=True, kw_only=True)
class PhimoeConfig(DecoderConfig):
    """The shape of a Phi MoE.

    jitter: how near logits must come to count in SparseMixer, see `RouterSpec`.
    sliding_window: how many tokens each one sees; None for all.
    """

    num_experts: int
    expert_ffn_size: int
    jitter: float
    sliding_window: int | None
    attention_bias: bool
    head_bias: bool

    @property
    def experts_per_token(self) -> int:
        """SparseMixer's two."""
        return EXPERTS_PER_TOKEN


def read_config(raw: Mapping[str, object]) -> PhimoeConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    fields.require("num_experts_per_tok", EXPERTS_PER_TOKEN)
    shared = read_decoder(fields, "phimoe", max_position=131_072, rope_theta=1e6, norm_eps=1e-5)
    window = fields.integer("sliding_window") if fields.has("sliding_window") else shared["max_position"]
    return PhimoeConfig(
        **shared,
        num_experts=fields.integer("num_local_experts", 16, low=EXPERTS_PER_TOKEN),
        expert_ffn_size=fields.integer("intermediate_size"),
        jitter=fields.number("router_jitter_noise", 0.01),
        sliding_window=window if window < shared["max_position"] else None,
        attention_bias=fields.flag("attention_bias", False),
        head_bias=fields.flag("lm_head_bias", False),
    )


def weight_map(config: PhimoeConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    specs = frame_specs(config, _layer_map)
    specs.append(whole("norm_bias", (config.hidden_size,), "vector", "model.norm.bias"))
    if config.head_bias:
        specs.append(whole("lm_head_bias", (config.vocab_size,), "vector", "lm_head.bias"))
    return specs


def _layer_map(config: PhimoeConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    moe, fused, bias = f"{source}.block_sparse_moe", f"{source}.mlp.experts", config.attention_bias
    routers = f"{moe}.gate.weight", f"{source}.mlp.router.weight"
    return [
        *_norm_map(f"{ours}.attention_norm", f"{source}.input_layernorm", hidden),
        *attention_specs(ours, f"{source}.self_attn", config.heads, hidden, qkv_bias=bias, out_bias=bias),
        *_norm_map(f"{ours}.moe_norm", f"{source}.post_attention_layernorm", hidden),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", *routers),
        # w1 is the gate and w3 is up; w2 is down. transformers 5 stacks them, experts first.
        *expert_specs(
            ours,
            ExpertSize(config.num_experts, config.expert_ffn_size, hidden),
            ExpertNames(f"{moe}.experts", "w1", "w3", "w2"),
            fused=(f"{fused}.gate_up_proj", f"{fused}.down_proj"),
        ),
    ]


def _norm_map(ours: str, source: str, hidden: int) -> list[WeightSpec]:
    return [
        whole(ours, (hidden,), "vector", f"{source}.weight"),
        whole(f"{ours}_bias", (hidden,), "vector", f"{source}.bias"),
    ]


def ignored_tensors(config: PhimoeConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: PhimoeConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    matrices = weights.matrices
    head = matrices["embed" if config.tied_embeddings else "lm_head"]
    return Decoder(
        embed=Embedding(matrices["embed"], ops),
        layers=build_layers(config, weights, max_len, ops, _build_layer),
        norm=_build_norm(config, weights, "norm", ops),
        lm_head=Linear(head, ops, weights.vectors.get("lm_head_bias")),
    )


def _build_layer(config: PhimoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices = weights.matrices
    spec = RouterSpec(
        config.num_experts, EXPERTS_PER_TOKEN, "sparsemixer", renormalize=False, jitter=config.jitter
    )
    return DecoderLayer(
        attention_norm=_build_norm(config, weights, "attention_norm", ops),
        attention=build_attention(config, weights, layer, rope, ops, window=config.sliding_window),
        feed_forward_norm=_build_norm(config, weights, "moe_norm", ops),
        feed_forward=MoELayer(
            router=Router(RouterWeights(matrices["router"]), spec, ops),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ),
        ops=ops,
    )


def _build_norm(config: PhimoeConfig, weights: Weights, name: str, ops: Ops) -> LayerNorm:
    return LayerNorm(weights.vectors[name], config.norm_eps, ops, weights.vectors[f"{name}_bias"])
