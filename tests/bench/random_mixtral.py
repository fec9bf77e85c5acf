"""A random Mixtral of 1.35 B parameters with the words of the default model: something large to measure.

Hidden 1024, 16 layers, 8 experts of 3072 (top-2), 16 heads on 4 KV heads, vocabulary 49152, untied; a token
reads 394 M weights. It answers noise, at the speed of a model that does not.

Run: python tests/bench/random_mixtral.py DIR     (2.7 GB; does nothing where it is complete)
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from toptwo.default_model import cache
from toptwo.default_model.recipe import prepare_default_model
from toptwo.settings import load_settings

HIDDEN, LAYERS, EXPERTS, FFN = 1024, 16, 8, 3072
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 16, 4, 64, 49152
STD = 0.02
LAYERS_PER_SHARD = 4  # 626 MB; with the layers before they are written, the most memory it takes

Shapes = dict[str, tuple[int, ...]]


def config_of(words: dict[str, object]) -> dict[str, object]:
    """`config.json`; words: that of the model whose tokenizer it takes."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        **{f"{role}_token_id": words.get(f"{role}_token_id") for role in ("bos", "eos", "pad")},
    }


def shards() -> Iterator[Shapes]:
    """Names and shapes of the tensors of each file."""
    table = (VOCAB, HIDDEN)
    yield {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (HIDDEN,)}
    for start in range(0, LAYERS, LAYERS_PER_SHARD):
        shapes: Shapes = {}
        for layer in range(start, start + LAYERS_PER_SHARD):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes().items()}
        yield shapes


def layer_shapes() -> Shapes:
    """One decoder layer as transformers 5 names it, experts stacked."""
    q_rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (q_rows, HIDDEN),
        "self_attn.k_proj.weight": (kv_rows, HIDDEN),
        "self_attn.v_proj.weight": (kv_rows, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q_rows),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate.weight": (EXPERTS, HIDDEN),
        "mlp.experts.gate_up_proj": (EXPERTS, 2 * FFN, HIDDEN),
        "mlp.experts.down_proj": (EXPERTS, HIDDEN, FFN),
    }


def draw(name: str, shape: tuple[int, ...], randomness: torch.Generator) -> Tensor:
    """Normal weights; norms are 1. Drawn in bfloat16, so that nothing is twice as large on the way."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD, generator=randomness)


def write_weights(directory: Path, advance: Callable[[int], object]) -> None:
    """All shards, one at a time, and their index."""
    randomness = torch.Generator().manual_seed(0)
    files = list(shards())
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for tensor_name, shape in shapes.items():
            tensors[tensor_name] = draw(tensor_name, shape, randomness)
            advance(tensors[tensor_name].nbytes)
        save_file(tensors, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def ensure(directory: Path, console: Console) -> Path:
    """Write the model to `directory`, unless it is there and complete."""
    if cache.is_complete(directory):
        return directory
    if directory.exists():
        raise SystemExit(f"{directory}: exists and is not this model, or only half of it; remove it first")
    settings, _ = load_settings({})
    words = prepare_default_model(settings.cache_dir, settings.default_model_wheel, console)
    directory.parent.mkdir(parents=True, exist_ok=True)
    total = sum(2 * torch.Size(shape).numel() for shapes in shards() for shape in shapes.values())
    with cache.staging(directory) as staging, Progress(console=console) as progress:
        checkpoint = staging / "checkpoint"
        checkpoint.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(words / file, checkpoint / file)
        config = config_of(json.loads((words / "config.json").read_text()))
        (checkpoint / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        task = progress.add_task(f"Drawing {directory.name}", total=total)
        write_weights(checkpoint, lambda size: progress.advance(task, size))
        cache.publish(checkpoint, directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    print(ensure(parser.parse_args().directory.expanduser().resolve(), Console()))


if __name__ == "__main__":
    main()
