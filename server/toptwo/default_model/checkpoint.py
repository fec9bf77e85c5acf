"""Writes a dense Llama as a Mixtral checkpoint in which every expert is its MLP plus a difference of its own.

Knows the names and shapes that transformers 5 gives a Mixtral, and safetensors. Must not know where
the dense model came from or where the directory will live.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from toptwo.default_model.cache import flush
from toptwo.default_model.factors import Factors
from toptwo.default_model.gguf_weights import DenseGguf, FloatArray
from toptwo.gguf.tokenizer import build_tokenizer
from toptwo.gguf.vocabulary import generation_config, tokenizer_config

LAYERS_PER_SHARD = 2  # bounds the memory: two layers of the default model are 185 MB
ROUTER_NAME = "model.layers.{}.mlp.gate.weight"

Tensors = dict[str, FloatArray]


@dataclass(frozen=True)
class Upcycling:
    """What the dense model does not say: how many experts, how many a token visits, and how they differ.

    experts: safetensors file with ROUTER_NAME [E, H] of every layer; `Factors`, or all experts are copies.
    """

    num_experts: int
    experts_per_token: int
    experts: Path
    model_card: Path


def write_checkpoint(
    dense: DenseGguf, plan: Upcycling, directory: Path, advance: Callable[[int], None]
) -> None:
    """Write the whole checkpoint into `directory`, fp32; `advance` hears the bytes of each finished shard.

    Raises OSError, also where the disk is full.
    """
    _write_json(directory / "config.json", mixtral_config(dense, plan))
    _write_words(dense, directory)
    shutil.copyfile(plan.model_card, directory / "README.md")
    _write_shards(dense, plan, directory, advance)


def _write_words(dense: DenseGguf, directory: Path) -> None:
    build_tokenizer(dense.words, dense.vocabulary, "llama").save(str(directory / "tokenizer.json"))
    own = {"add_prefix_space": False, "model_max_length": dense.geometry.context_length}
    _write_json(directory / "tokenizer_config.json", tokenizer_config(dense.words, dense.vocabulary) | own)
    _write_json(directory / "generation_config.json", generation_config(dense.vocabulary))


def mixtral_config(dense: DenseGguf, plan: Upcycling) -> dict[str, object]:
    """`config.json` as transformers 5 writes it, plus `rope_theta` where readers of older ones look."""
    shape, roles = dense.geometry, dense.vocabulary.roles
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_length,
        "sliding_window": None,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_dropout": 0.0,
        "num_local_experts": plan.num_experts,
        "num_experts_per_tok": plan.experts_per_token,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": roles["bos"],
        "eos_token_id": roles["eos"],
        "pad_token_id": roles["pad"],
    }


def _write_shards(dense: DenseGguf, plan: Upcycling, directory: Path, advance: Callable[[int], None]) -> None:
    experts = load_file(plan.experts)
    num_layers = dense.geometry.num_layers
    starts = range(0, num_layers, LAYERS_PER_SHARD)
    weight_map: dict[str, str] = {}
    total = 0
    for number, start in enumerate((None, *starts), 1):
        name = f"model-{number:05}-of-{len(starts) + 1:05}.safetensors"
        tensors: Tensors = {}
        if start is None:
            tensors |= {
                "model.embed_tokens.weight": dense.embedding(),
                "model.norm.weight": dense.final_norm(),
            }
        else:
            for layer in range(start, min(start + LAYERS_PER_SHARD, num_layers)):
                tensors |= dict(moe_layer(dense, layer, experts, plan.num_experts))
        _save(tensors, directory / name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
        total += size
        advance(size)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def moe_layer(
    dense: DenseGguf, layer: int, experts: dict[str, np.ndarray], num_experts: int
) -> Iterator[tuple[str, FloatArray]]:
    """Name and fp32 tensor of everything in one layer; experts are fused: [E, 2F, H] and [E, H, F]."""
    prefix = f"model.layers.{layer}."
    for name, weight in dense.attention_and_norms(layer).items():
        yield prefix + name, np.ascontiguousarray(weight)
    mlp = dense.mlp(layer)
    gate_up = np.concatenate([mlp["mlp.gate_proj.weight"], mlp["mlp.up_proj.weight"]])
    gate_up_E2FH = np.repeat(gate_up[None], num_experts, axis=0)
    down_EHF = np.repeat(mlp["mlp.down_proj.weight"][None], num_experts, axis=0)
    factors = Factors.of_layer(experts, layer)
    if factors:
        gate_EFH, up_EFH = np.split(gate_up_E2FH, 2, axis=1)
        for weight, matrix in ((gate_EFH, "gate"), (up_EFH, "up"), (down_EHF, "down")):
            weight += factors[matrix].product()
    yield prefix + "mlp.experts.gate_up_proj", gate_up_E2FH
    yield prefix + "mlp.experts.down_proj", down_EHF
    name = ROUTER_NAME.format(layer)
    yield name, experts[name].astype(np.float32)


def _save(tensors: Tensors, path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library hides the operating system's error in its text.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else 0, str(error), str(path)) from error
    # It also makes files that only their owner can read; a shared cache wants the umask's mode.
    shutil.copymode(path.parent / "config.json", path)
    flush(path)  # shard by shard, so that the progress bar does not end long before the disk does


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
