"""Grok-1 in float64, after the JAX code of the release: it shares nothing with the server.

Parameters have the release's names and layout: projections are [in, out]. `Grok1Family` writes them as
checkpoints in any of the three namings that people use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Parameters = dict[str, Tensor]
"""By "decoder_layer_0/moe/linear" and so on: the module path without "transformer/" or "language_model/"."""


@dataclass(frozen=True)
class Shape:
    """A tiny Grok-1. Heads are not hidden size / number of heads wide, unlike the real one's."""

    vocab_size: int = 320
    hidden_size: int = 64
    ffn_size: int = 48
    num_layers: int = 3
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 16
    num_experts: int = 5
    top_k: int = 2
    attention_multiplier: float = 0.4  # with a cap that low, many scores feel it
    max_attention: float = 1.5
    embedding_multiplier: float = 8.0
    logits_multiplier: float = 0.577


def random_parameters(shape: Shape, seed: int = 0) -> Parameters:
    """Weights as float32, none of them zero or one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, around: float = 0.0, scale: float = 0.1) -> Tensor:
        return around + scale * torch.randn(size, generator=generator)

    hidden, ffn, experts = shape.hidden_size, shape.ffn_size, shape.num_experts
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    parameters = {
        "in_out_embed": normal(shape.vocab_size, hidden),
        "rms_norm": normal(hidden, around=1.0, scale=0.2),
    }
    for layer in range(shape.num_layers):
        sizes = {
            "multi_head_attention/query": (hidden, q_width),
            "multi_head_attention/key": (hidden, kv_width),
            "multi_head_attention/value": (hidden, kv_width),
            "multi_head_attention/linear": (q_width, hidden),
            "router": (hidden, experts),
            "moe/linear": (experts, hidden, ffn),
            "moe/linear_v": (experts, hidden, ffn),
            "moe/linear_1": (experts, ffn, hidden),
        }
        parameters |= {f"decoder_layer_{layer}/{name}": normal(*size) for name, size in sizes.items()}
        for name in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3"):
            parameters[f"decoder_layer_{layer}/{name}"] = normal(hidden, around=1.0, scale=0.2)
    return parameters


def compute_logits(parameters: Parameters, shape: Shape, ids_T: Tensor) -> Tensor:
    """Logits [T, V] behind every token."""
    weights = {name: tensor.double() for name, tensor in parameters.items()}
    x = weights["in_out_embed"][ids_T] * shape.embedding_multiplier
    for layer in range(shape.num_layers):
        prefix = f"decoder_layer_{layer}/"
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        attended = _attend(own, shape, _norm(x, own["rms_norm"]))
        x = x + _norm(attended, own["rms_norm_1"])
        x = x + _norm(_mix(own, shape, _norm(x, own["rms_norm_2"])), own["rms_norm_3"])
    x = _norm(x, weights["rms_norm"])
    return x @ weights["in_out_embed"].T * shape.logits_multiplier


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return scale * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def _attend(own: Parameters, shape: Shape, x: Tensor) -> Tensor:
    length = len(x)
    heads = {
        name: (x @ own[f"multi_head_attention/{name}"]).view(length, -1, shape.head_dim)
        for name in ("query", "key", "value")
    }
    query, key = _turn(heads["query"]), _turn(heads["key"])
    out = []
    for head in range(shape.num_heads):
        shared = head // (shape.num_heads // shape.num_kv_heads)
        scores = query[:, head] @ key[:, shared].T * shape.attention_multiplier
        scores = shape.max_attention * torch.tanh(scores / shape.max_attention)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e30)
        out.append(scores.softmax(-1) @ heads["value"][:, shared])
    return torch.cat(out, -1) @ own["multi_head_attention/linear"]


def _turn(x: Tensor) -> Tensor:
    """Rotary embedding: position t turns the pair (i, i + D/2) by t * 10000^(-2i/D)."""
    length, _, dim = x.shape
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * frequencies)[:, None]
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, -1)


def _mix(own: Parameters, shape: Shape, x: Tensor) -> Tensor:
    """Every token's two experts, with the weights that softmax over all gave them."""
    probabilities = (x @ own["router"]).softmax(-1)
    rows = []
    for token, chances in zip(x, probabilities, strict=True):
        best = sorted(range(shape.num_experts), key=lambda expert: -float(chances[expert]))[: shape.top_k]
        parts = []
        for expert in best:
            gate, up = token @ own["moe/linear"][expert], token @ own["moe/linear_v"][expert]
            parts.append(chances[expert] * ((_gelu(gate) * up) @ own["moe/linear_1"][expert]))
        rows.append(sum(parts[1:], parts[0]))
    return torch.stack(rows)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def config_of(shape: Shape) -> dict[str, Any]:
    """As hpcai-tech writes it."""
    return {
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "grok-1",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "attn_output_multiplier": shape.attention_multiplier,
        "max_attn_value": shape.max_attention,
        "embedding_multiplier_scale": shape.embedding_multiplier,
        "output_multiplier_scale": shape.logits_multiplier,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


NAMES = {
    "hpcai": {
        "in_out_embed": "model.embed_tokens.weight",
        "rms_norm": "model.norm.scale",
        "layer": "model.layers.{i}.",
        "multi_head_attention/query": "attn.q_proj.weight",
        "multi_head_attention/key": "attn.k_proj.weight",
        "multi_head_attention/value": "attn.v_proj.weight",
        "multi_head_attention/linear": "attn.o_proj.weight",
        "layer/rms_norm": "pre_attn_norm.scale",
        "rms_norm_1": "post_attn_norm.scale",
        "rms_norm_2": "pre_moe_norm.scale",
        "rms_norm_3": "post_moe_norm.scale",
        "router": "moe_block.gate.weight",
        "moe/linear": "moe_block.experts.{e}.linear.weight",
        "moe/linear_v": "moe_block.experts.{e}.linear_v.weight",
        "moe/linear_1": "moe_block.experts.{e}.linear_1.weight",
    },
    "sglang": {
        "in_out_embed": "model.embed_tokens.weight",
        "rms_norm": "model.norm.weight",
        "layer": "model.layers.{i}.",
        "multi_head_attention/query": "self_attn.q_proj.weight",
        "multi_head_attention/key": "self_attn.k_proj.weight",
        "multi_head_attention/value": "self_attn.v_proj.weight",
        "multi_head_attention/linear": "self_attn.o_proj.weight",
        "layer/rms_norm": "pre_attn_norm.weight",
        "rms_norm_1": "post_attn_norm.weight",
        "rms_norm_2": "pre_moe_norm.weight",
        "rms_norm_3": "post_moe_norm.weight",
        "router": "block_sparse_moe.gate.weight",
        "moe/linear": "block_sparse_moe.experts.{e}.w1.weight",
        "moe/linear_v": "block_sparse_moe.experts.{e}.w3.weight",
        "moe/linear_1": "block_sparse_moe.experts.{e}.w2.weight",
    },
    "release": {
        "in_out_embed": "transformer.in_out_embed.weight",
        "rms_norm": "transformer.rms_norm.weight",
        "layer": "transformer.decoder_layer.{i}.",
        "multi_head_attention/query": "multi_head_attention.query.weight",
        "multi_head_attention/key": "multi_head_attention.key.weight",
        "multi_head_attention/value": "multi_head_attention.value.weight",
        "multi_head_attention/linear": "multi_head_attention.linear.weight",
        "layer/rms_norm": "rms_norm.weight",
        "rms_norm_1": "rms_norm_1.weight",
        "rms_norm_2": "rms_norm_2.weight",
        "rms_norm_3": "rms_norm_3.weight",
        "router": "router.weight",
        "moe/linear": "moe.{e}.linear.weight",
        "moe/linear_v": "moe.{e}.linear_v.weight",
        "moe/linear_1": "moe.{e}.linear_1.weight",
    },
}
"""What a parameter is called in a checkpoint; "{e}" stands for one of its experts."""


def named_tensors(parameters: Parameters, naming: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint: [out, in], experts one by one."""
    names, tensors = NAMES[naming], {}
    for path, parameter in parameters.items():
        layer, _, own = path.partition("/")
        if not own:
            tensors[names[path]] = parameter
            continue
        prefix = names["layer"].format(i=layer.removeprefix("decoder_layer_"))
        name = prefix + names["layer/rms_norm" if own == "rms_norm" else own]
        turned = parameter.transpose(-1, -2).contiguous() if parameter.dim() > 1 else parameter
        if turned.dim() == 3:
            tensors |= {name.format(e=e): each.contiguous() for e, each in enumerate(turned)}
        else:
            tensors[name] = turned
    return tensors


@dataclass(frozen=True)
class Grok1Family:
    """A tiny Grok-1; see `tiny.Family`."""

    shape: Shape = Shape()
    naming: str = "hpcai"

    def write(self, directory: Path, seed: int = 0, **overrides: Any) -> Callable[[Tensor], Tensor]:
        """Save a random checkpoint. overrides: of the config, or None to leave a key out."""
        parameters = random_parameters(self.shape, seed)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(named_tensors(parameters, self.naming), directory / "model.safetensors", {"format": "pt"})
        config = {
            key: value for key, value in {**config_of(self.shape), **overrides}.items() if value is not None
        }
        (directory / "config.json").write_text(json.dumps(config))
        return lambda ids_T: compute_logits(parameters, self.shape, ids_T).float()
