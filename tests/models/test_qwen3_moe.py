"""What is particular about Qwen3-MoE: QK-norm per head, dense layers, two names for the number of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

import parity
from published import QWEN3_30B_A3B, count_parameters
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
from toptwo.models import qwen3_moe
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["qwen3_moe"]

SHAPES: dict[str, dict[str, Any]] = {
    "not renormalised": {"norm_topk_prob": False},
    "experts in every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "experts nowhere": {"mlp_only_layers": [0, 1, 2]},
    "one expert per token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts": {"num_experts_per_tok": 8},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "heads as wide as usual": {"head_dim": 8},
    "a stretched context": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}

# As published, by transformers 4.51.
QWEN3_235B_A22B = {
    **QWEN3_30B_A3B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
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


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{LAYER}.self_attn.q_norm.weight"), f"misses {LAYER}.self_attn.q_norm.weight"),
        (without(f"{LAYER}.mlp.experts.5.up_proj.weight"), f"misses {LAYER}.mlp.experts.5.up_proj.weight"),
        (without(f"{LAYER}.mlp.gate.weight"), f"misses {LAYER}.mlp.gate.weight"),
        (without("model.layers.0.mlp.up_proj.weight"), "misses model.layers.0.mlp.up_proj.weight"),
        (
            replaced(f"{LAYER}.self_attn.k_norm.weight", torch.ones(32)),
            r"k_norm.weight has shape \[32\], expected \[16\]",
        ),
        (
            replaced(f"{LAYER}.mlp.shared_expert_gate.weight", torch.ones(1, 64)),
            f"has unknown {LAYER}.mlp.shared_expert_gate.weight",
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
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be between 1 and 8"),
        ({"num_local_experts": 0}, "num_local_experts must be between"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be between"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list of integers"),
        ({"mlp_only_layers": [0, None]}, r"mlp_only_layers\[1\] must be an integer"),
        ({"mlp_only_layers": [-1]}, r"mlp_only_layers\[0\] must be between 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be between"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(Qwen3MoeConfig(**QWEN3_30B_A3B).to_json_string())
    assert "num_experts" not in new
    assert "rope_theta" not in new
    assert qwen3_moe.read_config(new) == qwen3_moe.read_config(QWEN3_30B_A3B)


@pytest.mark.parametrize(
    ("raw", "billions"), [(QWEN3_30B_A3B, "30.5"), (QWEN3_235B_A22B, "235.1")], ids=["30B-A3B", "235B-A22B"]
)
def test_published_models_have_as_many_parameters_as_they_say(raw: dict[str, Any], billions: str) -> None:
    config = qwen3_moe.read_config(raw)
    assert f"{count_parameters(qwen3_moe.weight_map(config)) / 1e9:.1f}" == billions


def test_a_published_config_reads_to_its_shape() -> None:
    config = qwen3_moe.read_config(QWEN3_30B_A3B)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (128, 8, 768)
    assert (config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim) == (32, 4, 128)
    assert config.sparse_layers == frozenset(range(48))
    assert config.renormalize
    assert (config.rope.theta, config.rope.scaling, config.max_position) == (1e6, None, 40960)
