"""What is particular about OLMoE: QK-norm over all heads together, clipping, no renormalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig

import parity
from published import count_parameters
from tampering import (
    assert_config_refused,
    assert_tensors_refused,
    fuse_experts,
    replaced,
    rewrite,
    stack_experts,
    without,
)
from tiny import FAMILIES
from toptwo.models import olmoe
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["olmoe"]

SHAPES: dict[str, dict[str, Any]] = {
    "not clipped": {"clip_qkv": None},
    "clipped hard": {"clip_qkv": 0.1},
    "renormalised": {"norm_topk_prob": True},
    "multi-head": {"num_key_value_heads": None},
    "biases": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "all experts": {"num_experts_per_tok": 8},
}

# As published, by transformers 4.43.
OLMOE_1B_7B: dict[str, Any] = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


@pytest.mark.parametrize("layout", [stack_experts, fuse_experts])
def test_every_layout_of_the_experts_loads_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    one_by_one = parity.bits(tmp_path)
    rewrite(tmp_path, layout)
    assert torch.equal(parity.bits(tmp_path), one_by_one)


LAYER = "model.layers.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{LAYER}.self_attn.k_norm.weight"), f"misses {LAYER}.self_attn.k_norm.weight"),
        (without(f"{LAYER}.mlp.experts.0.gate_proj.weight"), f"misses {LAYER}.mlp.experts.0.gate_proj"),
        (
            # One head's, as Qwen3 has it.
            replaced(f"{LAYER}.self_attn.q_norm.weight", torch.ones(8)),
            r"q_norm.weight has shape \[8\], expected \[64\]",
        ),
        (
            replaced(f"{LAYER}.self_attn.k_norm.weight", torch.ones(64)),
            r"k_norm.weight has shape \[64\], expected \[16\]",
        ),
        (
            replaced(f"{LAYER}.self_attn.q_proj.bias", torch.ones(64)),
            f"has unknown {LAYER}.self_attn.q_proj.bias",
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
        ({"clip_qkv": 0}, "clip_qkv must be positive"),
        ({"clip_qkv": "1.0"}, "clip_qkv must be a number"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be between 1 and 8"),
        ({"intermediate_size": None}, "intermediate_size must be an integer"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false"),
        ({"attention_bias": 0}, "attention_bias must be true or false"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(OlmoeConfig(**OLMOE_1B_7B).to_json_string())
    assert "rope_theta" not in new
    assert olmoe.read_config(new) == olmoe.read_config(OLMOE_1B_7B)


def test_the_published_model_has_as_many_parameters_as_it_says() -> None:
    config = olmoe.read_config(OLMOE_1B_7B)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (64, 8, 1024)
    assert (config.renormalize, config.clip_qkv, config.norm_eps) == (False, None, 1e-5)
    assert f"{count_parameters(olmoe.weight_map(config)) / 1e9:.1f}" == "6.9"
