"""What is particular about dense Qwen3: QK-norm per head, heads as wide as the config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

import parity
from published import count_parameters
from tampering import assert_config_refused, assert_tensors_refused, replaced, rewrite, without
from tiny import FAMILIES
from toptwo.models import qwen3
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["qwen3"]

SHAPES: dict[str, dict[str, Any]] = {
    "a head of its own": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True},
    "multi-query, heads as wide as usual": {"num_key_value_heads": 1, "head_dim": 8},
    "a context that is not stretched": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}

# As published, by transformers 4.51.
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B = {
    **QWEN3_8B,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def test_a_head_written_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    expected = parity.bits(tmp_path)
    rewrite(tmp_path, replaced("lm_head.weight", torch.zeros(320, 64)))
    assert torch.equal(parity.bits(tmp_path), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without("model.layers.0.self_attn.k_norm.weight"),
            "misses model.layers.0.self_attn.k_norm.weight",
        ),
        (without("model.layers.2.mlp.gate_proj.weight"), "misses model.layers.2.mlp.gate_proj.weight"),
        (
            # All heads', as OLMoE has it.
            replaced("model.layers.0.self_attn.q_norm.weight", torch.ones(128)),
            r"q_norm.weight has shape \[128\], expected \[16\]",
        ),
        (
            replaced("model.layers.0.mlp.gate.weight", torch.ones(4, 64)),
            "has unknown model.layers.0.mlp.gate.weight",
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
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"intermediate_size": 1 << 25}, "intermediate_size must be between"),
        ({"attention_bias": "none"}, "attention_bias must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(Qwen3Config(**QWEN3_8B).to_json_string())
    assert "rope_theta" not in new
    assert qwen3.read_config(new) == qwen3.read_config(QWEN3_8B)


def test_a_head_has_128_dimensions_where_the_config_does_not_say() -> None:
    raw = {key: value for key, value in QWEN3_0_6B.items() if key != "head_dim"}
    assert qwen3.read_config(raw) == qwen3.read_config(QWEN3_0_6B)


@pytest.mark.parametrize(("raw", "billions"), [(QWEN3_8B, "8.2"), (QWEN3_0_6B, "0.6")], ids=["8B", "0.6B"])
def test_published_models_have_as_many_parameters_as_they_say(raw: dict[str, Any], billions: str) -> None:
    config = qwen3.read_config(raw)
    assert f"{count_parameters(qwen3.weight_map(config)) / 1e9:.1f}" == billions
    assert config.heads.head_dim == 128
