"""Reads a dense Llama out of a GGUF file: its geometry, its fp32 tensors, its tokenizer fields.

Knows GGUF's tensor names and metadata keys and undoes what the conversion to GGUF did to the weights.
Must not know experts, checkpoints on disk or where the file came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class TokenizerFields:
    """What a GGUF says about its byte-level BPE. `merges` are pairs joined by one space."""

    tokens: list[str]
    merges: list[str]
    special_ids: list[int]
    bos_id: int
    eos_id: int
    pad_id: int
    unknown_id: int
    chat_template: str


class DenseGguf:
    """A GGUF file with a Llama whose output matrix is its embedding. The file stays memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.geometry = Geometry(
            num_layers=self._field("llama.block_count"),
            hidden_size=self._field("llama.embedding_length"),
            ffn_size=self._field("llama.feed_forward_length"),
            num_heads=self._field("llama.attention.head_count"),
            num_kv_heads=self._field("llama.attention.head_count_kv"),
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            context_length=self._field("llama.context_length"),
            rope_theta=_shortest(self._field("llama.rope.freq_base")),
            rms_norm_eps=_shortest(self._field("llama.attention.layer_norm_rms_epsilon")),
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

    def tokenizer(self) -> TokenizerFields:
        """The vocabulary in id order, the merges in rank order, and the ids with a role."""
        types: list[int] = self._field("tokenizer.ggml.token_type")
        return TokenizerFields(
            tokens=self._field("tokenizer.ggml.tokens"),
            merges=self._field("tokenizer.ggml.merges"),
            special_ids=[i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL],
            bos_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_id=self._field("tokenizer.ggml.padding_token_id"),
            unknown_id=self._field("tokenizer.ggml.unknown_token_id"),
            chat_template=self._field("tokenizer.chat_template"),
        )

    def _block(self, layer: int, names: dict[str, str]) -> dict[str, FloatArray]:
        return {name: self._tensor(f"blk.{layer}.{short}.weight") for name, short in names.items()}

    def _tensor(self, name: str) -> FloatArray:
        tensor = self._tensors[name]
        weights: FloatArray = gguf.dequantize(tensor.data, tensor.tensor_type)
        return weights

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise KeyError(f"the GGUF file has no {key}")
        return field.contents()


def split_halves(weight: FloatArray, num_heads: int) -> FloatArray:
    """Rows of a q or k projection [heads * D, H], from GGUF's order to Hugging Face's.

    GGUF rotates neighbouring pairs (0,1), (2,3), ...; Hugging Face rotates (0, D/2), (1, D/2 + 1), ...
    So each head's even rows come first, then its odd rows.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _shortest(value: float) -> float:
    """GGUF stores float32: 1e-05 comes back as 9.999999747378752e-06. The shortest decimal is meant."""
    return float(str(np.float32(value)))
