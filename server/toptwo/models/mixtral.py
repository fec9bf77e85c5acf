"""Mixtral 8x7B, 8x22B and everything built like them (arXiv 2401.04088).

Reference implementation: transformers' MixtralForCausalLM. Softmax over all experts, top-k,
renormalised; rotary embedding in the half-rotation layout; no biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from toptwo.errors import StartupError
from toptwo.layers.attention import Attention
from toptwo.layers.context import StepContext
from toptwo.layers.embedding import Embedding
from toptwo.layers.linear import Linear
from toptwo.layers.norm import RMSNorm
from toptwo.models.checkpoint import Piece, Weights, WeightSpec, whole
from toptwo.models.fields import ConfigFields, rope_theta
from toptwo.moe.experts import Experts
from toptwo.moe.layer import MoELayer
from toptwo.moe.router import Router
from toptwo_kernels.ops import HeadShape, Matrix, Ops, Rope, RouterSpec, rope_tables


@dataclass(frozen=True)
class MixtralConfig:
    """The shape of a Mixtral."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: HeadShape
    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    max_position: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    architecture: str = "mixtral"


def read_config(raw: Mapping[str, object]) -> MixtralConfig:
    """See `registry.Architecture.read_config`. Reads files of transformers 4 and 5."""
    fields = ConfigFields(raw)
    fields.require("hidden_act", "silu")
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    heads = HeadShape(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden // num_heads),
    )
    if num_heads % heads.num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if heads.head_dim % 2:
        raise fields.error("head_dim", f"must be even, not {heads.head_dim}")
    num_experts = fields.integer("num_local_experts", 8)
    max_position = fields.integer("max_position_embeddings", 131_072)
    if fields.has("sliding_window") and fields.integer("sliding_window") < max_position:
        raise fields.error("sliding_window", "below max_position_embeddings is not supported")
    return MixtralConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        heads=heads,
        num_experts=num_experts,
        experts_per_token=fields.integer("num_experts_per_tok", 2, high=num_experts),
        expert_ffn_size=fields.integer("intermediate_size"),
        max_position=max_position,
        rope_theta=rope_theta(fields, 1e6),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
    )


def weight_map(config: MixtralConfig) -> Sequence[WeightSpec]:
    """See `registry.Architecture.weight_map`."""
    hidden = config.hidden_size
    specs = [whole("embed", (config.vocab_size, hidden), "head", "model.embed_tokens.weight")]
    for layer in range(config.num_layers):
        specs += _layer_map(config, layer)
    specs.append(whole("norm", (hidden,), "vector", "model.norm.weight"))
    if not config.tied_embeddings:
        specs.append(whole("lm_head", (config.vocab_size, hidden), "head", "lm_head.weight"))
    return specs


def _layer_map(config: MixtralConfig, layer: int) -> list[WeightSpec]:
    hidden, ffn, num_experts = config.hidden_size, config.expert_ffn_size, config.num_experts
    q_rows = config.heads.num_heads * config.heads.head_dim
    kv_rows = config.heads.num_kv_heads * config.heads.head_dim
    source, ours = f"model.layers.{layer}", f"layers.{layer}"
    moe = f"{source}.block_sparse_moe"
    all_experts = range(num_experts)
    qkv = (
        Piece(f"{source}.self_attn.q_proj.weight", (slice(0, q_rows),)),
        Piece(f"{source}.self_attn.k_proj.weight", (slice(q_rows, q_rows + kv_rows),)),
        Piece(f"{source}.self_attn.v_proj.weight", (slice(q_rows + kv_rows, None),)),
    )
    # w1 is the gate and w3 is up; w2 is down. transformers 5 stacks them, experts first.
    gates = tuple(Piece(f"{moe}.experts.{e}.w1.weight", (e, slice(0, ffn))) for e in all_experts)
    ups = tuple(Piece(f"{moe}.experts.{e}.w3.weight", (e, slice(ffn, None))) for e in all_experts)
    downs = tuple(Piece(f"{moe}.experts.{e}.w2.weight", (e,)) for e in all_experts)
    gate_up_shape, down_shape = (num_experts, 2 * ffn, hidden), (num_experts, hidden, ffn)
    routers = f"{moe}.gate.weight", f"{source}.mlp.gate.weight"
    fused_gate_up, fused_down = f"{source}.mlp.experts.gate_up_proj", f"{source}.mlp.experts.down_proj"
    return [
        whole(f"{ours}.attention_norm", (hidden,), "vector", f"{source}.input_layernorm.weight"),
        WeightSpec(f"{ours}.qkv", (q_rows + 2 * kv_rows, hidden), "matrix", (qkv,)),
        whole(f"{ours}.out", (hidden, q_rows), "matrix", f"{source}.self_attn.o_proj.weight"),
        whole(f"{ours}.moe_norm", (hidden,), "vector", f"{source}.post_attention_layernorm.weight"),
        whole(f"{ours}.router", (num_experts, hidden), "router", *routers),
        WeightSpec(f"{ours}.gate_up", gate_up_shape, "paired", (gates + ups, (Piece(fused_gate_up),))),
        WeightSpec(f"{ours}.down", down_shape, "matrix", (downs, (Piece(fused_down),))),
    ]


def ignored_tensors(config: MixtralConfig) -> Sequence[str]:
    """See `registry.Architecture.ignored_tensors`: a tied head may be written out all the same."""
    return ["lm_head.weight"] if config.tied_embeddings else []


@dataclass(frozen=True)
class DecoderLayer:
    """h = x + attention(norm(x)); out = h + moe(norm(h))."""

    attention_norm: RMSNorm
    attention: Attention
    moe_norm: RMSNorm
    moe: MoELayer
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        x_TH = self.ops.add(x_TH, self.attention(self.attention_norm(x_TH), step))
        return self.ops.add(x_TH, self.moe(self.moe_norm(x_TH)))


@dataclass(frozen=True)
class Mixtral:
    """See `checkpoint.CausalLM`."""

    embed: Embedding
    layers: list[DecoderLayer]
    norm: RMSNorm
    lm_head: Linear

    def forward(self, step: StepContext) -> Tensor:
        x_TH = self.embed(step)
        for layer in self.layers:
            x_TH = layer(x_TH, step)
        return x_TH

    def logits(self, x_SH: Tensor) -> Tensor:
        return self.lm_head(self.norm(x_SH))


def build(config: MixtralConfig, weights: Weights, max_len: int, ops: Ops) -> Mixtral:
    """See `registry.Architecture.build`."""
    if max_len > config.max_position:
        raise StartupError(f"max_model_len {max_len} is over the model's {config.max_position} positions")
    rope = rope_tables(max_len, config.heads.head_dim, config.rope_theta)
    return Mixtral(
        embed=Embedding(weights.matrices["embed"], ops),
        layers=[_build_layer(config, weights, layer, rope, ops) for layer in range(config.num_layers)],
        norm=RMSNorm(weights.vectors["norm"], config.norm_eps, ops),
        lm_head=Linear(weights.matrices["embed" if config.tied_embeddings else "lm_head"], ops),
    )


def _build_layer(config: MixtralConfig, weights: Weights, layer: int, rope: Rope, ops: Ops) -> DecoderLayer:
    def matrix(name: str) -> Matrix:
        return weights.matrices[f"layers.{layer}.{name}"]

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weights.vectors[f"layers.{layer}.{name}"], config.norm_eps, ops)

    spec = RouterSpec(config.num_experts, config.experts_per_token)
    return DecoderLayer(
        attention_norm=norm("attention_norm"),
        attention=Attention(
            layer=layer,
            shape=config.heads,
            qkv=Linear(matrix("qkv"), ops),
            out=Linear(matrix("out"), ops),
            rope=rope,
            ops=ops,
        ),
        moe_norm=norm("moe_norm"),
        moe=MoELayer(
            router=Router(matrix("router"), spec, ops),
            experts=Experts(matrix("gate_up"), matrix("down"), "silu", ops),
        ),
        ops=ops,
    )
