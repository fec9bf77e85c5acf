"""What is particular about Granite MoE: multipliers everywhere, and experts in one tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeConfig

import parity
from published import count_parameters
from tampering import (
    Tensors,
    assert_config_refused,
    assert_tensors_refused,
    edit_config,
    replaced,
    rewrite,
    without,
)
from tiny import FAMILIES
from toptwo.models import granitemoe
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["granitemoe"]

SHAPES: dict[str, dict[str, Any]] = {
    "multipliers of one": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "a head of its own": {"tie_word_embeddings": False},
    "no biases": {"attention_bias": False},
    "one expert": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 6},
    "multi-head": {"num_key_value_heads": None},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1.5e6}},
}

# As published, by transformers 4.46.
GRANITE_1B: dict[str, Any] = {
    "architectures": ["GraniteMoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "logits_scaling": 6.0,
    "max_position_embeddings": 4096,
    "model_type": "granitemoe",
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49155,
}
GRANITE_3B = {
    **GRANITE_1B,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_local_experts": 40,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


@pytest.mark.parametrize(
    "multiplier", ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"]
)
def test_every_multiplier_counts(tmp_path: Path, multiplier: str) -> None:
    FAMILY.write(tmp_path)
    before = parity.bits(tmp_path)
    edit_config(tmp_path, **{multiplier: 2 * FAMILY.shape[multiplier]})
    assert (parity.bits(tmp_path) - before).abs().max() > 1e-3


def as_transformers_5_names_them(tensors: Tensors) -> Tensors:
    names = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }
    made = {}
    for name, tensor in tensors.items():
        old = next((old for old in names if name.endswith(old)), "")
        made[name.removesuffix(old) + names.get(old, "")] = tensor
    assert made.keys() != tensors.keys()
    return made


def one_per_projection(tensors: Tensors) -> Tensors:
    """As GGUF files have them."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        moe, _, last = name.rpartition("block_sparse_moe.")
        prefix = f"{moe}block_sparse_moe.experts"
        if last == "input_linear.weight":
            made |= zip((f"{prefix}.w1.weight", f"{prefix}.w3.weight"), tensor.chunk(2, dim=1), strict=True)
        elif last == "output_linear.weight":
            made[f"{prefix}.w2.weight"] = tensor
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("layout", [as_transformers_5_names_them, one_per_projection])
def test_every_layout_of_the_experts_loads_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    released = parity.bits(tmp_path)
    rewrite(tmp_path, layout)
    assert torch.equal(parity.bits(tmp_path), released)


def test_a_tied_head_may_be_written_out(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    before = parity.bits(tmp_path)
    rewrite(tmp_path, replaced("lm_head.weight", torch.ones(320, 64)))
    assert torch.equal(parity.bits(tmp_path), before)


MOE = "model.layers.1.block_sparse_moe"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{MOE}.input_linear.weight"), f"misses {MOE}.input_linear.weight"),
        (without(f"{MOE}.output_linear.weight"), f"misses {MOE}.output_linear.weight"),
        (without(f"{MOE}.router.layer.weight"), f"misses {MOE}.router.layer.weight"),
        (without("model.layers.1.self_attn.v_proj.bias"), "misses model.layers.1.self_attn.v_proj.bias"),
        (
            replaced(f"{MOE}.input_linear.weight", torch.ones(6, 48, 64)),
            r"input_linear.weight has shape \[6, 48, 64\], expected \[6, 96, 64\]",
        ),
        (
            replaced("model.layers.1.mlp.gate.weight", torch.ones(6, 64)),
            "has unknown model.layers.1.mlp.gate",
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
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be between 1 and 6"),
        ({"embedding_multiplier": 0}, "embedding_multiplier must be positive"),
        ({"attention_multiplier": "small"}, "attention_multiplier must be a number"),
        ({"residual_multiplier": -1.0}, "residual_multiplier must be positive"),
        ({"logits_scaling": 0.0}, "logits_scaling must be positive"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"intermediate_size": None}, "intermediate_size must be an integer"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(GraniteMoeConfig(**GRANITE_1B).to_json_string())
    assert "rope_theta" not in new
    assert granitemoe.read_config(new) == granitemoe.read_config(GRANITE_1B)


@pytest.mark.parametrize(
    ("raw", "billions"), [(GRANITE_1B, "1.3"), (GRANITE_3B, "3.3")], ids=["1B-A400M", "3B-A800M"]
)
def test_published_models_have_as_many_parameters_as_they_say(raw: dict[str, Any], billions: str) -> None:
    config = granitemoe.read_config(raw)
    assert f"{count_parameters(granitemoe.weight_map(config)) / 1e9:.1f}" == billions


def test_a_published_config_reads_to_its_shape() -> None:
    config = granitemoe.read_config(GRANITE_1B)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (32, 8, 512)
    assert (config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim) == (16, 8, 64)
    assert (config.rope.theta, config.max_position, config.norm_eps) == (1e4, 4096, 1e-6)
    assert (config.embedding_multiplier, config.attention_multiplier) == (12.0, 0.015625)
    assert (config.residual_multiplier, config.logits_scaling, config.tied_embeddings) == (0.22, 6.0, True)
