"""Granite 3.x MoE and PowerMoE (IBM, October 2024): small experts, and a multiplier on everything.

Reference implementation: transformers' GraniteMoeForCausalLM. Odd: embeddings, attention scores, both
branches of a layer and logits are multiplied by numbers of the config (muP, arXiv 2203.03466); softmax over
the chosen logits only; all experts of a layer are in one tensor, gates before ups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from toptwo.layers.attention import Attention
from toptwo.layers.context import StepContext
from toptwo.layers.embedding import ScaledEmbedding
from toptwo.layers.linear import ScaledLinear
from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Piece, Weights, WeightSpec
from toptwo.models.decoder import (
    Decoder,
    DecoderConfig,
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


@dataclass(frozen=True, kw_only=True)
class GraniteMoeConfig(DecoderConfig):
    """The shape of a Granite MoE.

    attention_bias: all four projections have one.
    embedding_multiplier, attention_multiplier, residual_multiplier: on embeddings, on q . k in place of the
        usual scale, and on what a branch adds to the stream. logits_scaling: what logits are divided by.
    """

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    attention_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float


def read_config(raw: Mapping[str, object]) -> GraniteMoeConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    num_experts = fields.integer("num_local_experts", 8)
    return GraniteMoeConfig(
        **read_decoder(fields, "granitemoe", max_position=2048),
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 2, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        attention_bias=fields.flag("attention_bias", False),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        attention_multiplier=fields.number("attention_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        logits_scaling=fields.number("logits_scaling", 1.0),
    )


def weight_map(config: GraniteMoeConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: GraniteMoeConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    moe, bias = f"{source}.block_sparse_moe", config.attention_bias
    routers = f"{moe}.router.layer.weight", f"{moe}.router.weight"
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, f"{source}.self_attn", config.heads, hidden, qkv_bias=bias, out_bias=bias),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", *routers),
        *_expert_map(config, ours, moe),
    ]


def _expert_map(config: GraniteMoeConfig, ours: str, moe: str) -> list[WeightSpec]:
    """IBM's names, those of transformers 5, or one tensor per projection."""
    size = ExpertSize(config.num_experts, config.expert_ffn_size, config.hidden_size)
    fused = f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj"
    gate_up, down = expert_specs(ours, size, ExpertNames(f"{moe}.experts", "w1", "w3", "w2"), fused=fused)
    ibm_gate_up, ibm_down = Piece(f"{moe}.input_linear.weight"), Piece(f"{moe}.output_linear.weight")
    return [
        replace(gate_up, sources=((ibm_gate_up,), *gate_up.sources)),
        replace(down, sources=((ibm_down,), *down.sources)),
    ]


def ignored_tensors(config: GraniteMoeConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


@dataclass(frozen=True)
class GraniteMoeLayer:
    """h = x + m * attention(norm(x)); out = h + m * moe(norm(h)), m being the residual multiplier."""

    attention_norm: RMSNorm
    attention: Attention
    moe_norm: RMSNorm
    moe: MoELayer
    multiplier: float
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        x_TH = self._add(x_TH, self.attention(self.attention_norm(x_TH), step))
        return self._add(x_TH, self.moe(self.moe_norm(x_TH)))

    def _add(self, x_TH: Tensor, branch_TH: Tensor) -> Tensor:
        return self.ops.add(x_TH, self.ops.scale(branch_TH, self.multiplier))


def build(config: GraniteMoeConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    matrices = weights.matrices
    head = matrices["embed" if config.tied_embeddings else "lm_head"]
    return Decoder(
        embed=ScaledEmbedding(matrices["embed"], config.embedding_multiplier, ops),
        layers=build_layers(config, weights, max_len, ops, _build_layer),
        norm=RMSNorm(weights.vectors["norm"], config.norm_eps, ops),
        lm_head=ScaledLinear(head, 1 / config.logits_scaling, ops),
    )


def _build_layer(
    config: GraniteMoeConfig, weights: Weights, layer: int, rope: Rope, ops: Ops
) -> GraniteMoeLayer:
    matrices, vectors = weights.matrices, weights.vectors
    spec = RouterSpec(config.num_experts, config.experts_per_token, over_selected=True, renormalize=False)
    return GraniteMoeLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=build_attention(config, weights, layer, rope, ops, scale=config.attention_multiplier),
        moe_norm=RMSNorm(vectors["moe_norm"], config.norm_eps, ops),
        moe=MoELayer(
            router=Router(RouterWeights(matrices["router"]), spec, ops),
            experts=Experts(ExpertWeights(matrices["gate_up"], matrices["down"]), ops),
        ),
        multiplier=config.residual_multiplier,
        ops=ops,
    )
