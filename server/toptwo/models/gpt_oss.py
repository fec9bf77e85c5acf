"""gpt-oss 20B and 120B (arXiv 2508.10925).

Reference implementation: transformers' GptOssForCausalLM. What is odd about it: every other layer sees a
window only; a head has a sink, a score without a value; all projections have biases, the router and the
experts too; the experts' activation is clamped, and their gates and ups take turns in the checkpoint. The
largest logits are chosen first, then softmax is taken over those alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Piece, Weights, WeightSpec
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
from toptwo.models.weight_specs import attention_specs, whole
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import ExpertWeights, Ops, Rope, RouterSpec, RouterWeights

SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """The shape of a gpt-oss.

    windows: per layer, how many tokens each one sees; None for all.
    swiglu_limit: where the experts' activation is cut off.
    """

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    swiglu_limit: float
    attention_bias: bool
    windows: tuple[int | None, ...]


def read_config(raw: Mapping[str, object]) -> GptOssConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    if not (fields.has("rope_parameters") or fields.has("rope_scaling")):
        fields = ConfigFields({**raw, "rope_scaling": DEFAULT_ROPE})
    fields.require("hidden_act", "silu")
    fields.require("swiglu_alpha", 1.702)
    num_experts = fields.integer("num_local_experts")
    shared = read_decoder(fields, "gpt_oss", max_position=131_072, rope_theta=150_000.0, norm_eps=1e-5)
    return GptOssConfig(
        **shared,
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 4, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        swiglu_limit=fields.number("swiglu_limit", 7.0),
        attention_bias=fields.flag("attention_bias", True),
        windows=_read_windows(fields, shared["num_layers"], shared["max_position"]),
    )


def _read_windows(fields: ConfigFields, num_layers: int, max_position: int) -> tuple[int | None, ...]:
    """By `layer_types`, or every other layer from the first on."""
    kinds = tuple((SLIDING, FULL)[layer % 2] for layer in range(num_layers))
    if fields.has("layer_types"):
        kinds = fields.choices("layer_types", num_layers, SLIDING, FULL)
    window = fields.integer("sliding_window", 128)
    return tuple(window if kind == SLIDING and window < max_position else None for kind in kinds)


def weight_map(config: GptOssConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    return frame_specs(config, _layer_map)


def _layer_map(config: GptOssConfig, layer: int) -> list[WeightSpec]:
    hidden, source, ours = config.hidden_size, f"model.layers.{layer}", f"layers.{layer}"
    heads, bias, router = config.heads, config.attention_bias, f"{source}.mlp.router"
    sinks = f"{source}.self_attn.sinks"  # GGUF's names all end in .weight or .bias
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        *attention_specs(ours, f"{source}.self_attn", heads, hidden, qkv_bias=bias, out_bias=bias),
        whole(f"{ours}.sinks", (heads.num_heads,), "vector", sinks, f"{sinks}.weight"),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        whole(f"{ours}.router", (config.num_experts, hidden), "router", f"{router}.weight"),
        whole(f"{ours}.router_bias", (config.num_experts,), "vector", f"{router}.bias"),
        *_expert_map(config, ours, f"{source}.mlp.experts"),
    ]


def _expert_map(config: GptOssConfig, ours: str, source: str) -> list[WeightSpec]:
    """Of dense checkpoints, which hold [E, H, 2F] and [E, F, H]; of those in MXFP4, whose blocks are decoded
    to [E, 2F, H] and [E, H, F]; and of GGUF, which keeps gates and ups apart."""
    experts, hidden, ffn = config.num_experts, config.hidden_size, config.expert_ffn_size
    gate_up, down = f"{source}.gate_up_proj", f"{source}.down_proj"
    gates, ups = f"{source}.gate_proj", f"{source}.up_proj"
    gate_rows, up_rows = (slice(None), slice(0, ffn)), (slice(None), slice(ffn, None))
    gate_up_sources = (
        (Piece(gate_up, view=_from_transposed),),
        (Piece(f"{gate_up}_blocks", view=_gates_first),),
        (Piece(f"{gates}.weight", gate_rows), Piece(f"{ups}.weight", up_rows)),
    )
    down_sources = (
        (Piece(down, view=_transposed),),
        (Piece(f"{down}_blocks"),),
        (Piece(f"{down}.weight"),),
    )
    bias_sources = (
        (Piece(f"{gate_up}_bias", view=_gates_first),),
        (Piece(f"{gates}.bias", gate_rows), Piece(f"{ups}.bias", up_rows)),
    )
    return [
        WeightSpec(f"{ours}.gate_up", (experts, 2 * ffn, hidden), "paired", gate_up_sources),
        WeightSpec(f"{ours}.gate_up_bias", (experts, 2 * ffn), "vector", bias_sources),
        WeightSpec(f"{ours}.down", (experts, hidden, ffn), "matrix", down_sources),
        whole(f"{ours}.down_bias", (experts, hidden), "vector", f"{down}_bias", f"{down}.bias"),
    ]


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


def _gates_first(weight: Tensor) -> Tensor:
    """Rows gate, up, gate, up, … of dimension 1, put so that all gates come before all ups."""
    return torch.unflatten(weight, 1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _from_transposed(weight: Tensor) -> Tensor:
    return _gates_first(_transposed(weight))


def ignored_tensors(config: GptOssConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`."""
    return ignored_head(config)


def build(config: GptOssConfig, weights: Weights, max_len: int, ops: Ops) -> Decoder:
    """See `registry.Architecture.build`."""
    layers = build_layers(config, weights, max_len, ops, _build_layer)
    return build_frame(config, weights, layers, ops)


def _build_layer(config: GptOssConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    matrices, vectors = weights.matrices, weights.vectors
    spec = RouterSpec(config.num_experts, config.experts_per_token, over_selected=True, renormalize=False)
    experts = ExpertWeights(
        matrices["gate_up"],
        matrices["down"],
        activation="clamped_swiglu",
        gate_up_bias_EF=vectors["gate_up_bias"],
        down_bias_EH=vectors["down_bias"],
        limit=config.swiglu_limit,
    )
    attention = build_attention(
        config, weights, layer, rope, ops, window=config.windows[layer], sinks_N=vectors["sinks"]
    )
    return DecoderLayer(
        attention_norm=RMSNorm(vectors["attention_norm"], config.norm_eps, ops),
        attention=attention,
        feed_forward_norm=RMSNorm(vectors["moe_norm"], config.norm_eps, ops),
        feed_forward=MoELayer(
            router=Router(RouterWeights(matrices["router"], vectors["router_bias"]), spec, ops),
            experts=Experts(experts, ops),
        ),
        ops=ops,
    )
