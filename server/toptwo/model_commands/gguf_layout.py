"""What a Mixtral becomes in a GGUF file: llama.cpp's names, shapes, order of rows and metadata.

Knows the ways in which checkpoints name the experts, and llama.cpp's conventions for the architecture
"llama". Must not know number formats, tokenizers or files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

import gguf
from torch import Tensor

from toptwo.models.checkpoint import Index
from toptwo.models.mixtral import MixtralConfig

ARCHITECTURE = "llama"  # llama.cpp's Mixtral is a Llama with experts
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


class Role(Enum):
    """What a tensor is for; an export's type chooses a number format for each."""

    FINE = "norms and routers"
    TABLE = "embedding and head"
    MATRIX = "attention and experts"


@dataclass(frozen=True)
class Part:
    """A part of the checkpoint tensor `source`, which must have the shape `whole`; index () is all of it."""

    source: str
    whole: tuple[int, ...]
    index: Index = ()


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    parts: stacked in this order they fill `shape`.
    rotated_heads: of a q or k projection, how many heads its rows are; 0 for all other tensors.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    rotated_heads: int = 0


def tensors_of(config: MixtralConfig, names: Collection[str]) -> list[GgufTensor]:
    """Every tensor of the file, in its order. names: what the checkpoint holds; tells which layout it has."""
    table = (config.vocab_size, config.hidden_size)
    tensors = [_single("token_embd", Role.TABLE, table, "model.embed_tokens.weight")]
    for layer in range(config.num_layers):
        tensors += _layer(config, layer, names)
    tensors.append(_single("output_norm", Role.FINE, (config.hidden_size,), "model.norm.weight"))
    # llama.cpp takes the embedding for the head where there is none.
    if not config.tied_embeddings:
        tensors.append(_single("output", Role.TABLE, table, "lm_head.weight"))
    return tensors


def _single(name: str, role: Role, shape: tuple[int, ...], source: str, rotated_heads: int = 0) -> GgufTensor:
    return GgufTensor(f"{name}.weight", role, shape, (Part(source, shape),), rotated_heads)


def _layer(config: MixtralConfig, layer: int, names: Collection[str]) -> Iterator[GgufTensor]:
    hidden, heads = config.hidden_size, config.heads
    q_rows, kv_rows = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    block, source = f"blk.{layer}", f"model.layers.{layer}"
    attention = f"{source}.self_attn"
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for ours, theirs in norms.items():
        yield _single(f"{block}.{ours}", Role.FINE, (hidden,), f"{source}.{theirs}.weight")
    for letter, rows, rotated in (
        ("q", q_rows, heads.num_heads),
        ("k", kv_rows, heads.num_kv_heads),
        ("v", kv_rows, 0),
    ):
        projection = f"{attention}.{letter}_proj.weight"
        yield _single(f"{block}.attn_{letter}", Role.MATRIX, (rows, hidden), projection, rotated)
    yield _single(f"{block}.attn_output", Role.MATRIX, (hidden, q_rows), f"{attention}.o_proj.weight")
    routers = [f"{source}.{room}.gate.weight" for room in ("mlp", "block_sparse_moe")]
    router = routers[0] if routers[0] in names else routers[1]
    yield _single(f"{block}.ffn_gate_inp", Role.FINE, (config.num_experts, hidden), router)
    layout = _per_expert
    if f"{source}.mlp.experts.gate_up_proj" in names:
        layout = _fused
    elif f"{source}.block_sparse_moe.experts.w1.weight" in names:
        layout = _stacked
    for matrix in ("gate", "up", "down"):
        shape = (hidden, config.expert_ffn_size) if matrix == "down" else (config.expert_ffn_size, hidden)
        parts = layout(config, source, matrix)
        yield GgufTensor(
            f"{block}.ffn_{matrix}_exps.weight", Role.MATRIX, (config.num_experts, *shape), parts
        )


def _fused(config: MixtralConfig, source: str, matrix: str) -> tuple[Part, ...]:
    """transformers 5 stacks the experts, and in each of them the gate on up."""
    experts, ffn, hidden = range(config.num_experts), config.expert_ffn_size, config.hidden_size
    if matrix == "down":
        name, whole = f"{source}.mlp.experts.down_proj", (config.num_experts, hidden, ffn)
        return tuple(Part(name, whole, (expert,)) for expert in experts)
    name, whole = f"{source}.mlp.experts.gate_up_proj", (config.num_experts, 2 * ffn, hidden)
    rows = slice(0, ffn) if matrix == "gate" else slice(ffn, 2 * ffn)
    return tuple(Part(name, whole, (expert, rows)) for expert in experts)


def _stacked(config: MixtralConfig, source: str, matrix: str) -> tuple[Part, ...]:
    """GGUF files have one tensor of all experts for each of the three."""
    ffn, hidden = config.expert_ffn_size, config.hidden_size
    each = (hidden, ffn) if matrix == "down" else (ffn, hidden)
    name = f"{source}.block_sparse_moe.experts.{MIXTRAL_NAMES[matrix]}.weight"
    return (Part(name, (config.num_experts, *each)),)


def _per_expert(config: MixtralConfig, source: str, matrix: str) -> tuple[Part, ...]:
    ffn, hidden = config.expert_ffn_size, config.hidden_size
    whole = (hidden, ffn) if matrix == "down" else (ffn, hidden)
    experts = f"{source}.block_sparse_moe.experts"
    return tuple(
        Part(f"{experts}.{e}.{MIXTRAL_NAMES[matrix]}.weight", whole) for e in range(config.num_experts)
    )


def interleave_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a q or k projection [heads * D, H], from Hugging Face's order to llama.cpp's.

    Hugging Face rotates (0, D/2), (1, D/2 + 1), ...; llama.cpp rotates neighbours (0, 1), (2, 3), ...
    So row i of a head's first half becomes its row 2i, and row i of the second its row 2i + 1.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def add_hyperparameters(writer: gguf.GGUFWriter, config: MixtralConfig) -> None:
    """The shape of the model, as llama.cpp wants to know it."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.expert_ffn_size)
    writer.add_head_count(config.heads.num_heads)
    writer.add_head_count_kv(config.heads.num_kv_heads)
    writer.add_key_length(config.heads.head_dim)
    writer.add_value_length(config.heads.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.heads.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
