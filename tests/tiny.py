"""Tiny random checkpoints of every architecture, written by transformers: real files, no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # for tensors this small, a second thread only waits for the first


def write_mixtral(directory: Path, seed: int = 0, **overrides: Any) -> Any:
    """Save a random MixtralForCausalLM to `directory` and return it (float32, eval mode)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,  # large enough that logits and routing are decisive
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**{**shape, **overrides})).eval()
    model.save_pretrained(directory)
    return model


def load_runner(
    directory: Path,
    *,
    max_model_len: int | None = None,
    num_blocks: int = 64,
    dtype: str = "float32",
    backend: str = "auto",
    quantization: str = "auto",
    threads: int = 1,
    cache_dir: Path | None = None,
    routers: Sequence[torch.Tensor] = (),
) -> Any:
    """The checkpoint as the server loads it, with a KV pool of `num_blocks` blocks and 32 slots.

    dtype "auto" is the server's own choice; with the default one, quantised weights have a float32 KV cache.

    routers: matrices [E, H] to put in place of the loaded ones, one per layer.
    """
    from toptwo.models.registry import read_config
    from toptwo.runtime.build import build_runtime
    from toptwo.runtime.kv_cache import BLOCK_SIZE, kv_bytes_per_token
    from toptwo.settings import Settings

    kv_dtype = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(read_config(directory)[1], kv_dtype)
    settings = Settings(
        max_model_len=max_model_len,
        max_num_seqs=32,
        kv_cache_gib=num_blocks * block_bytes / 2**30,
        dtype=dtype,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        quantization=quantization,  # type: ignore[arg-type]
        threads=threads,
        **({"cache_dir": cache_dir} if cache_dir else {}),  # type: ignore[arg-type]
    )
    runtime = build_runtime(settings, directory)
    assert runtime.info.num_blocks == num_blocks
    for layer, weight in zip(runtime.model.layers, routers, strict=bool(routers)):  # type: ignore[attr-defined]
        # In place: a recorded step reads the weights where they are.
        layer.moe.router.weight.data.copy_(layer.ops.pack(weight, "float32").data)
    return runtime.runner


def forward_all(directory: Path, token_ids: list[int], **options: Any) -> torch.Tensor:
    """Logits [T, V] after every token of one sequence, computed one token per step."""
    from toptwo.messages import NewSequence, Row, SamplingParams, StepPlan

    runner = load_runner(directory, **options)
    blocks = list(range(0, 2 * (1 + len(token_ids) // 16), 2))[::-1]  # scattered, not in order
    admitted = [NewSequence(3, token_ids, len(token_ids), SamplingParams(seed=0), blocks)]
    logits = []
    for position in range(len(token_ids)):
        plan = StepPlan(position, admitted, [Row(3, position, 1, [], True)])
        admitted = []
        logits.append(runner.compute_logits(plan)[0][0].clone())  # the next step writes over it
    return torch.stack(logits)


def write_chat_mixtral(directory: Path, **overrides: Any) -> None:
    """A tiny Mixtral that can be served: with a byte-level tokenizer and the ChatML template.

    Its answers are noise that practically never ends by itself: the end token's logit is always 0.
    """
    from safetensors.torch import load_file, save_file

    import fakes

    tokenizer = fakes.byte_level_vocabulary()
    start, end = (tokenizer.token_to_id(token) for token in fakes.CONTROL_TOKENS)
    shape = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": start, "eos_token_id": end}
    write_mixtral(directory, max_position_embeddings=8192, **{**shape, **overrides})
    tokenizer.save(str(directory / "tokenizer.json"))
    words = {"chat_template": fakes.CHATML, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][end] = 0.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
