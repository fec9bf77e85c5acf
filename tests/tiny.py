"""Tiny random checkpoints of every architecture, written by transformers: real files, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


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
        "initializer_range": 0.2,  # large enough that logits and routing are decisive
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**{**shape, **overrides})).eval()
    model.save_pretrained(directory)
    return model
