"""What is particular about Llama: stretched contexts, optional biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import parity
from published import count_parameters
from tampering import assert_config_refused, assert_tensors_refused, replaced, rewrite, without
from tiny import FAMILIES
from toptwo.models import llama
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["llama"]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "multi-head": {"num_key_value_heads": None},
    "multi-query, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "stretched as Llama 3.1": {
        "rope_parameters": {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    },
    "stretched linearly": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
}

# As published, by transformers 4.31, 4.43 and 4.45.
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_1_8B: dict[str, Any] = {
    **LLAMA_2_7B,
    "attention_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_3_2_1B: dict[str, Any] = {
    **LLAMA_3_1_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA3, "factor": 32.0},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def test_frequencies_that_old_exporters_wrote_are_ignored(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    expected = parity.bits(tmp_path)
    rewrite(tmp_path, replaced("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)))
    assert torch.equal(parity.bits(tmp_path), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.layers.1.mlp.down_proj.weight"), "misses model.layers.1.mlp.down_proj.weight"),
        (without("lm_head.weight"), "misses lm_head.weight"),
        (
            replaced("model.layers.1.self_attn.v_proj.weight", torch.ones(64, 64)),
            r"v_proj.weight has shape \[64, 64\], expected \[16, 64\]",
        ),
        (
            replaced("model.layers.1.self_attn.o_proj.bias", torch.ones(64)),
            "has unknown model.layers.1.self_attn.o_proj.bias",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    FAMILY.write(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"attention_bias": "q"}, "attention_bias must be true or false"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_attention_heads": 7}, "num_key_value_heads must divide"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


@pytest.mark.parametrize("old", [LLAMA_2_7B, LLAMA_3_1_8B, LLAMA_3_2_1B], ids=["2-7B", "3.1-8B", "3.2-1B"])
def test_configs_of_transformers_4_and_5_read_alike(old: dict[str, Any]) -> None:
    new = json.loads(LlamaConfig(**old).to_json_string())
    assert "rope_theta" not in new
    assert llama.read_config(new) == llama.read_config(old)


@pytest.mark.parametrize(
    ("raw", "billions"),
    [(LLAMA_2_7B, "6.74"), (LLAMA_3_1_8B, "8.03"), (LLAMA_3_2_1B, "1.24")],
    ids=["2-7B", "3.1-8B", "3.2-1B"],
)
def test_published_models_have_as_many_parameters_as_they_say(raw: dict[str, Any], billions: str) -> None:
    config = llama.read_config(raw)
    assert f"{count_parameters(llama.weight_map(config)) / 1e9:.2f}" == billions
