"""The frame that architectures fill in: embedding, decoder layers, final norm, head.

Knows what nearly all of them have in common, and no architecture by name. What only one of them does is a
small class in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from toptwo.errors import StartupError
from toptwo.layers.attention import Attention, NormedQKV
from toptwo.layers.context import StepContext
from toptwo.layers.embedding import Embedding
from toptwo.layers.linear import Linear
from toptwo.layers.norm import RMSNorm
from toptwo.layers.rope import RopeConfig
from toptwo.models.checkpoint import Weights, WeightSpec
from toptwo.models.fields import ConfigFields
from toptwo.models.rope import read_rope
from toptwo.models.weight_specs import whole
from toptwo_kernels.ops import AttentionSpec, HeadShape, KVShape, Ops, Rope

Norm = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, StepContext], Tensor]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every architecture's config says."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: HeadShape
    max_position: int
    rope: RopeConfig
    norm_eps: float
    tied_embeddings: bool

    @property
    def kv_shape(self) -> KVShape:
        """What a layer caches of a token."""
        return self.heads


Config = TypeVar("Config", bound=DecoderConfig)


def read_heads(fields: ConfigFields, hidden: int) -> HeadShape:
    """Heads by transformers' usual keys."""
    num_heads = fields.integer("num_attention_heads")
    heads = HeadShape(
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden // num_heads),
    )
    if num_heads % heads.num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if heads.head_dim % 2:
        raise fields.error("head_dim", f"must be even, not {heads.head_dim}")
    return heads


def read_decoder(
    fields: ConfigFields,
    architecture: str,
    *,
    max_position: int,
    rope_theta: float = 10_000.0,
    norm_eps: float = 1e-6,
    tied_embeddings: bool = False,
) -> dict[str, Any]:
    """The fields of `DecoderConfig` by transformers' usual keys; keywords are what absent ones mean."""
    hidden = fields.integer("hidden_size")
    heads = read_heads(fields, hidden)
    return {
        "architecture": architecture,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.integer("num_hidden_layers"),
        "heads": heads,
        "max_position": fields.integer("max_position_embeddings", max_position),
        "rope": read_rope(fields, rope_theta, heads.head_dim),
        "norm_eps": fields.number("rms_norm_eps", norm_eps),
        "tied_embeddings": fields.flag("tie_word_embeddings", tied_embeddings),
    }


def layer_specs(config: Config, layer_map: Callable[[Config, int], list[WeightSpec]]) -> list[WeightSpec]:
    """The weights of all layers, by what `layer_map` says of each."""
    return [spec for layer in range(config.num_layers) for spec in layer_map(config, layer)]


def frame_specs(config: Config, layer_map: Callable[[Config, int], list[WeightSpec]]) -> list[WeightSpec]:
    """The layers' weights, and embedding, final norm and head around them by transformers' usual names."""
    vocabulary = config.vocab_size, config.hidden_size
    specs = [whole("embed", vocabulary, "head", "model.embed_tokens.weight"), *layer_specs(config, layer_map)]
    specs.append(whole("norm", (config.hidden_size,), "vector", "model.norm.weight"))
    if not config.tied_embeddings:
        specs.append(whole("lm_head", vocabulary, "head", "lm_head.weight"))
    return specs


def ignored_head(config: DecoderConfig) -> list[str]:
    """A tied head, which may be written out all the same."""
    return ["lm_head.weight"] if config.tied_embeddings else []


@dataclass(frozen=True)
class DecoderLayer:
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h))."""

    attention_norm: Norm
    attention: Layer
    feed_forward_norm: Norm
    feed_forward: Callable[[Tensor], Tensor]
    ops: Ops

    def __call__(self, x_TH: Tensor, step: StepContext) -> Tensor:
        x_TH = self.ops.add(x_TH, self.attention(self.attention_norm(x_TH), step))
        return self.ops.add(x_TH, self.feed_forward(self.feed_forward_norm(x_TH)))


@dataclass(frozen=True)
class Decoder:
    """See `checkpoint.CausalLM`."""

    embed: Callable[[StepContext], Tensor]
    layers: Sequence[Layer]
    norm: Norm
    lm_head: Callable[[Tensor], Tensor]

    def forward(self, step: StepContext) -> Tensor:
        x_TH = self.embed(step)
        for layer in self.layers:
            x_TH = layer(x_TH, step)
        return x_TH

    def logits(self, x_SH: Tensor) -> Tensor:
        return self.lm_head(self.norm(x_SH))


def build_layers(
    config: Config,
    weights: Weights,
    max_len: int,
    ops: Ops,
    build_layer: Callable[[Config, Weights, int, Rope, Ops], Layer],
) -> list[Layer]:
    """Every layer over its own weights, for sequences up to `max_len` tokens.

    Raises StartupError if the model has no such positions.
    """
    if max_len > config.max_position:
        raise StartupError(f"max_model_len {max_len} is over the model's {config.max_position} positions")
    rope = config.rope.tables(max_len, config.heads.head_dim)
    return [
        build_layer(config, weights.under(f"layers.{layer}"), layer, rope, ops)
        for layer in range(config.num_layers)
    ]


def build_frame(config: DecoderConfig, weights: Weights, layers: Sequence[Layer], ops: Ops) -> Decoder:
    """The layers between a plain embedding, an RMSNorm, and a head that may be tied."""
    return Decoder(
        embed=Embedding(weights.matrices["embed"], ops),
        layers=layers,
        norm=RMSNorm(weights.vectors["norm"], config.norm_eps, ops),
        lm_head=Linear(weights.matrices["embed" if config.tied_embeddings else "lm_head"], ops),
    )


def build_attention(
    config: DecoderConfig, weights: Weights, layer: int, rope: Rope, ops: Ops, **options: Any
) -> Attention:
    """Plain attention over the weights of `weight_specs.attention_specs`. options: those of `AttentionSpec`
    that differ from the usual."""
    scale = options.pop("scale", config.heads.head_dim**-0.5)
    return Attention(
        layer=layer,
        spec=AttentionSpec(config.heads, scale, **options),
        qkv=Linear(weights.matrices["qkv"], ops, weights.vectors.get("qkv_bias")),
        out=Linear(weights.matrices["out"], ops, weights.vectors.get("out_bias")),
        rope=rope,
        ops=ops,
    )


def build_normed_attention(
    config: DecoderConfig, weights: Weights, layer: int, rope: Rope, ops: Ops
) -> Attention:
    """The same with queries and keys normalised by the weights of `weight_specs.qk_norm_specs`."""
    plain, vectors = build_attention(config, weights, layer, rope, ops), weights.vectors
    qkv = NormedQKV(plain.qkv, config.heads, vectors["q_norm"], vectors["k_norm"], config.norm_eps, ops)
    return replace(plain, qkv=qkv)
