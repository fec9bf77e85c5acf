"""Reads a dense Llama out of a GGUF file: its geometry, its fp32 tensors, its vocabulary.

Knows llama.cpp's names of a Llama's tensors and metadata, and what it did to the order of rows. Must not know
experts, checkpoints on disk or where the file came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toptwo.gguf.header import read_gguf
from toptwo.gguf.numbers import read_numbers, split_halves
from toptwo.gguf.vocabulary import read_vocabulary

FloatArray = NDArray[np.float32]

# Hugging Face's name inside a decoder layer -> GGUF's name inside a block.
ATTENTION_AND_NORMS = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm",
}
MLP = {
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
}


@dataclass(frozen=True)
class Geometry:
    """The shape of a dense Llama; sizes in elements, context in tokens."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class DenseGguf:
    """A GGUF file with a Llama whose output matrix is its embedding.

    words: the metadata below "tokenizer". vocabulary: its tokens.
    """

    def __init__(self, path: Path) -> None:
        gguf = read_gguf([path])
        self._tensors = gguf.tensors
        keys, self.words = gguf.metadata.below("llama"), gguf.metadata.below("tokenizer")
        self.vocabulary = read_vocabulary(self.words)
        self.geometry = Geometry(
            num_layers=keys.integer("block_count"),
            hidden_size=keys.integer("embedding_length"),
            ffn_size=keys.integer("feed_forward_length"),
            num_heads=keys.integer("attention.head_count"),
            num_kv_heads=keys.integer("attention.head_count_kv"),
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            context_length=keys.integer("context_length"),
            rope_theta=keys.number("rope.freq_base"),
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        )

    def embedding(self) -> FloatArray:
        """[V, H], also the output matrix."""
        return self._tensor("token_embd.weight")

    def final_norm(self) -> FloatArray:
        """[H]"""
        return self._tensor("output_norm.weight")

    def attention_and_norms(self, layer: int) -> dict[str, FloatArray]:
        """Hugging Face names (inside the layer) -> fp32 weights of everything but the MLP."""
        weights = self._block(layer, ATTENTION_AND_NORMS)
        heads = {
            "self_attn.q_proj.weight": self.geometry.num_heads,
            "self_attn.k_proj.weight": self.geometry.num_kv_heads,
        }
        return weights | {name: split_halves(weights[name], num) for name, num in heads.items()}

    def mlp(self, layer: int) -> dict[str, FloatArray]:
        """`mlp.{gate,up}_proj.weight` [F, H] and `mlp.down_proj.weight` [H, F], fp32."""
        return self._block(layer, MLP)

    def _block(self, layer: int, names: dict[str, str]) -> dict[str, FloatArray]:
        return {name: self._tensor(f"blk.{layer}.{short}.weight") for name, short in names.items()}

    def _tensor(self, name: str) -> FloatArray:
        return read_numbers(self._tensors[name])
