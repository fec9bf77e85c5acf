"""What is particular about Qwen2-MoE: the gated shared expert, biases on q, k and v, dense layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig

import parity
from published import count_parameters
from tampering import (
    Tensors,
    assert_config_refused,
    assert_tensors_refused,
    fuse_experts,
    replaced,
    rewrite,
    stack_experts,
    without,
)
from tiny import FAMILIES
from toptwo.models import qwen2_moe
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["qwen2_moe"]

SHAPES: dict[str, dict[str, Any]] = {
    "renormalised": {"norm_topk_prob": True},
    "experts in every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "experts everywhere": {"mlp_only_layers": []},
    "no biases": {"qkv_bias": False},
    "all experts": {"num_experts_per_tok": 6},
    "tied embeddings": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 8},
}

# As published, by transformers 4.38.
QWEN1_5_MOE_A2_7B: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_57B_A14B = {
    **QWEN1_5_MOE_A2_7B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def flatten_gates(tensors: Tensors) -> Tensors:
    """The shared experts' gates as vectors, as old GGUF files have them."""
    return {name: t[0] if name.endswith("expert_gate.weight") else t for name, t in tensors.items()}


@pytest.mark.parametrize("layout", [stack_experts, fuse_experts, flatten_gates])
def test_every_layout_of_the_experts_loads_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    one_by_one = parity.bits(tmp_path)
    rewrite(tmp_path, layout)
    assert torch.equal(parity.bits(tmp_path), one_by_one)


MLP = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{MLP}.shared_expert_gate.weight"), f"misses {MLP}.shared_expert_gate.weight"),
        (without(f"{MLP}.shared_expert.down_proj.weight"), f"misses {MLP}.shared_expert.down_proj.weight"),
        (without(f"{MLP}.experts.3.down_proj.weight"), f"misses {MLP}.experts.3.down_proj.weight"),
        (without("model.layers.1.mlp.up_proj.weight"), "misses model.layers.1.mlp.up_proj.weight"),
        (without("model.layers.2.self_attn.k_proj.bias"), "misses model.layers.2.self_attn.k_proj.bias"),
        (
            replaced(f"{MLP}.shared_expert_gate.weight", torch.ones(2, 64)),
            r"shared_expert_gate.weight has shape \[2, 64\] and gives \[1, 128\], expected \[1, 64\]",
        ),
        (
            replaced(f"{MLP}.shared_expert.up_proj.weight", torch.ones(32, 64)),
            r"shared_expert.up_proj.weight has shape \[32, 64\], expected \[64, 64\]",
        ),
        (
            replaced("model.layers.0.self_attn.o_proj.bias", torch.ones(64)),
            "has unknown model.layers.0.self_attn.o_proj.bias",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    FAMILY.write(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"num_experts": 0}, "num_experts must be between"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be between 1 and 6"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be between"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step must be between"),
        ({"mlp_only_layers": {"0": 1}}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": [True]}, r"mlp_only_layers\[0\] must be an integer"),
        ({"qkv_bias": "yes"}, "qkv_bias must be true or false"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(Qwen2MoeConfig(**QWEN1_5_MOE_A2_7B).to_json_string())
    assert "rope_theta" not in new
    assert qwen2_moe.read_config(new) == qwen2_moe.read_config(QWEN1_5_MOE_A2_7B)


@pytest.mark.parametrize(
    ("raw", "billions"), [(QWEN1_5_MOE_A2_7B, "14.3"), (QWEN2_57B_A14B, "57.4")], ids=["A2.7B", "57B-A14B"]
)
def test_published_models_have_as_many_parameters_as_they_say(raw: dict[str, Any], billions: str) -> None:
    config = qwen2_moe.read_config(raw)
    assert f"{count_parameters(qwen2_moe.weight_map(config)) / 1e9:.1f}" == billions


def test_a_published_config_reads_to_its_shape() -> None:
    config = qwen2_moe.read_config(QWEN1_5_MOE_A2_7B)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (60, 4, 1408)
    assert (config.shared_ffn_size, config.renormalize, config.qkv_bias) == (5632, False, True)
    assert config.heads.head_dim == 128
    assert config.sparse_layers == frozenset(range(24))
    assert (config.rope.theta, config.max_position) == (1e6, 8192)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"decoder_sparse_step": 5}, {4}),
        ({"decoder_sparse_step": 6}, set()),
        ({"mlp_only_layers": [0, 4]}, {1, 2, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3, 2]}, {1}),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: set[int]) -> None:
    config = qwen2_moe.read_config({**QWEN1_5_MOE_A2_7B, "num_hidden_layers": 5, **changes})
    assert config.sparse_layers == expected
