"""Grok-1 (xAI, March 2024): 314 billion parameters, 8 experts of which 2 are chosen.

Reference implementation: the JAX code released with the weights; other servers differ from it and from each
other. Odd: softmax over all experts, and the weights of the two that are chosen do not add up to 1; attention
scores are capped at 30; norms before and behind both branches of a layer; embeddings and logits are
multiplied by numbers of the config; the head is the embedding. The cap of 30 on router logits, which SGLang
and vLLM add, is not in the release and is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from toptwo.layers.attention import Attention
from toptwo.layers.context import StepContext
from toptwo.layers.embedding import ScaledEmbedding
from toptwo.layers.linear import ScaledLinear
from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
    build_attention,
    build_layers,
    ignored_head,
    layer_specs,
    read_decoder,
)
from toptwo.models.fields import ConfigFields
from toptwo.models.weight_specs import ExpertNames, ExpertSize, expert_specs, joined_rows, whole
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights

# Keys of configs for other code, Grok-2's among it, with the values that mean what is done here.
ALLOWED: dict[str, tuple[object, ...]] = {
    "hidden_act": (None, "gelu", "gelu_tanh", "gelu_pytorch_tanh"),  # all of them by its tanh form, as in JAX
    "router_logit_softcapping": (None, 0, 30),
    "final_logit_softcapping": (None, 0),
    "attn_logit_softcapping_method": (None, "tanh"),
    "attn_temperature_len": (None, -1),
    "residual_moe": (None, False),
    "rope_type": (None, "default"),
    "rope_rotate_half_dims": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class Grok1Config(DecoderConfig):
    """The shape of a Grok-1.

    soft_cap: of attention scores. The multipliers are on embeddings, on q . k, and on logits.
    """

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    soft_cap: float
    embedding_multiplier: float
    attention_multiplier: float
    logits_multiplier: float


def read_config(raw: Mapping[str, object]) -> Grok1Config:
    """See `registry.Architecture.read_config`. Reads the configs that came with all three namings."""
    fields = ConfigFields(raw)
    for key, values in ALLOWED.items():
        fields.require(key, *values)
    shared = read_decoder(fields, "grok1", max_position=8192, norm_eps=1e-5, tied_embeddings=True)
    num_experts = fields.integer("num_experts", fields.integer("num_local_experts", 8))
    return Grok1Config(
        **shared,
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 2, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        soft_cap=fields.number("max_attn_value", fields.number("attn_logit_softcapping", 30.0)),
        embedding_multiplier=fields.number("embedding_multiplier_scale", math.sqrt(shared["hidden_size"])),
        attention_multiplier=fields.number("attn_output_multiplier", shared["heads"].head_dim ** -0.5),
        logits_multiplier=fields.number("output_multiplier_scale"),
    )


def weight_map(config: Grok1Config) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    vocabulary = config.vocab_size, config.hidden_size
    embeddings = "model.embed_tokens.weight", "transformer.in_out_embed.weight"
    norms = "model.norm.scale", "model.norm.weight", "transformer.rms_norm.weight"
    specs = [
        whole("embed", vocabulary, "head", *embeddings),
        *layer_specs(config, _layer_map),
        whole("norm", (config.hidden_size,), "vector", *norms),
    ]
    if not config.tied_embeddings:
        specs.append(whole("lm_head", vocabulary, "head", "lm_head.weight"))
    return specs


def _layer_map(config: Grok1Config, layer: int) -> list[WeightSpec]:
    """A layer by the names that hpcai-tech gave it, by those that SGLang reads, and by the release's own."""
    hidden, num_experts, ours = config.hidden_size, config.num_experts, f"layers.{layer}"
    torch, jax = f"model.layers.{layer}", f"transformer.decoder_layer.{layer}"
    moe, mixtral = f"{torch}.moe_block", f"{torch}.block_sparse_moe"
    routers = f"{moe}.gate.weight", f"{mixtral}.gate.weight", f"{jax}.router.weight"

    def norm(name: str, torch_name: str, jax_name: str) -> WeightSpec:
        names = f"{torch}.{torch_name}.scale", f"{torch}.{torch_name}.weight", f"{jax}.{jax_name}.weight"
        return whole(f"{ours}.{name}", (hidden,), "vector", *names)

    return [
        norm("attention_norm", "pre_attn_norm", "rms_norm"),
        *_attention_map(config, ours, torch, jax),
        norm("attention_out_norm", "post_attn_norm", "rms_norm_1"),
        norm("moe_norm", "pre_moe_norm", "rms_norm_2"),
        whole(f"{ours}.router", (num_experts, hidden), "router", *routers),
        *expert_specs(
            ours,
            ExpertSize(num_experts, config.expert_ffn_size, hidden),
            ExpertNames(f"{moe}.experts", "linear", "linear_v", "linear_1"),
            ExpertNames(f"{mixtral}.experts", "w1", "w3", "w2"),
            ExpertNames(f"{jax}.moe", "linear", "linear_v", "linear_1"),
        ),
        norm("moe_out_norm", "post_moe_norm", "rms_norm_3"),
    ]


def _attention_map(config: Grok1Config, ours: str, torch: str, jax: str) -> list[WeightSpec]:
    heads, hidden = config.heads, config.hidden_size
    q_rows, kv_rows = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    namings = [
        [f"{torch}.attn.{name}_proj" for name in ("q", "k", "v", "o")],
        [f"{torch}.self_attn.{name}_proj" for name in ("q", "k", "v", "o")],
        [f"{jax}.multi_head_attention.{name}" for name in ("query", "key", "value", "linear")],
    ]
    qkv = [joined_rows([(q, q_rows), (k, kv_rows), (v, kv_rows)], ".weight") for q, k, v, _ in namings]
    return [
        WeightSpec(f"{ours}.qkv", (q_rows + 2 * kv_rows, hidden), "matrix", tuple(qkv)),
        whole(f"{ours}.out", (hidden, q_rows), "matrix", *(f"{names[-1]}.weight" for names in namings)),
    ]


def ignored_tensors(config: Grok1Config) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


@dataclass(frozen=True)
class Grok1Layer:
    """h = x + norm(attention(norm(x))); out = h + norm(moe(norm(h)))."""

    attention_norm: RMSNorm
    attention: Attention
    attention_out_norm: RMSNorm
    moe_norm: RMSNorm
    moe: MoELayer
    moe_out_norm: RMSNorm
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        branch_TH = self.attention_out_norm(self.attention(self.attention_norm(x_TH), step))
        x_TH = self.ops.add(x_TH, branch_TH)
        return self.ops.add(x_TH, self.moe_out_norm(self.moe(self.moe_norm(x_TH))))


def build(config: Grok1Config, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    matrices = weights.matrices
    head = matrices["embed" if config.tied_embeddings else "lm_head"]
    return Decoder(
        embed=ScaledEmbedding(matrices["embed"], config.embedding_multiplier, ops),
        layers=build_layers(config, weights, max_len, ops, _build_layer),
        norm=RMSNorm(weights.vectors["norm"], config.norm_eps, ops),
        lm_head=ScaledLinear(head, config.logits_multiplier, ops),
    )


def _build_layer(config: Grok1Config, weights: Weights, layer: int, rope: Rope, ops: Ops) -> Grok1Layer:
    matrices, vectors = weights.matrices, weights.vectors
    spec = RouterSpec(config.num_experts, config.experts_per_token, renormalize=False)
    return Grok1Layer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_attention(
            config, weights, layer, rope, ops, scale=config.attention_multiplier, soft_cap=config.soft_cap
        ),
        attention_out_norm=RMSNorm(vectors["attention_out_norm"], config.norm_eps, ops),
        moe_norm=RMSNorm(vectors["moe_norm"], config.norm_eps, ops),
        moe=MoELayer(
            router=Router(RouterWeights(matrices["router"]), spec, ops),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"], "gelu_tanh"), ops),
        ),
        moe_out_norm=RMSNorm(vectors["moe_out_norm"], config.norm_eps, ops),
        ops=ops,
    )
