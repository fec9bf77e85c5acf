"""What is particular about Phi-3.5-MoE: SparseMixer, biases, and a rotary embedding for long contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PhimoeConfig

import parity
from published import count_parameters
from tampering import (
    EXPERT,
    Tensors,
    assert_config_refused,
    assert_tensors_refused,
    edit_config,
    replaced,
    rewrite,
    stack_experts,
    without,
)
from tiny import FAMILIES
from toptwo.layers.rope import LongRopeScaling
from toptwo.models import phimoe
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["phimoe"]
ROPE = FAMILY.shape["rope_parameters"]

SHAPES: dict[str, dict[str, Any]] = {
    "little jitter": {"router_jitter_noise": 0.01},
    "much jitter": {"router_jitter_noise": 0.9},
    "two experts": {"num_local_experts": 2},
    "no biases": {"attention_bias": False, "lm_head_bias": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "a plain rotary embedding": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "a window that the prompt outgrows": {"sliding_window": 24},
}

# As published, by transformers 4.43; the factors are made up.
SHORT, LONG = [1.0 + i / 64 for i in range(64)], [1.0 + i for i in range(64)]
PHI_3_5_MOE: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": LONG,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": SHORT,
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def logits(directory: Path, **options: Any) -> torch.Tensor:
    """Bit by bit the same when the weights are: only the native backend promises that."""
    return parity.prompt_logits(
        directory, [len(parity.PROMPT)], backend="cpu", quantization="none", **options
    )


def test_contexts_beyond_the_original_take_the_long_factors(tmp_path: Path) -> None:
    """transformers takes the short ones always: those of another config are our long ones here."""
    as_short = {**ROPE, "short_factor": ROPE["long_factor"], "short_mscale": ROPE["long_mscale"]}
    reference = FAMILY.write(tmp_path, rope_parameters=as_short)
    with torch.inference_mode():
        expected = reference(parity.PROMPT)
    edit_config(tmp_path, rope_parameters=ROPE)
    short = logits(tmp_path, max_model_len=512)
    edit_config(tmp_path, original_max_position_embeddings=128)
    torch.testing.assert_close(logits(tmp_path, max_model_len=129), expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(tmp_path, max_model_len=128), short)
    assert not torch.allclose(short, expected, atol=0.1)


def fused(tensors: Tensors) -> Tensors:
    """As transformers 5 has them in memory."""
    made = stack_experts(tensors)
    for layer in range(3):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (made.pop(f"{old}.experts.{each}.weight") for each in ("w1", "w2", "w3"))
        made |= {f"{new}.experts.gate_up_proj": torch.cat((w1, w3), 1), f"{new}.experts.down_proj": w2}
        made[f"{new}.router.weight"] = made.pop(f"{old}.gate.weight")
    assert not any(EXPERT.fullmatch(name) for name in made)
    return made


@pytest.mark.parametrize("layout", [stack_experts, fused])
def test_every_layout_of_the_experts_loads_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    one_by_one = logits(tmp_path)
    rewrite(tmp_path, layout)
    assert torch.equal(logits(tmp_path), one_by_one)


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{LAYER}.input_layernorm.bias"), f"misses {LAYER}.input_layernorm.bias"),
        (without("model.norm.bias"), "misses model.norm.bias"),
        (without("lm_head.bias"), "misses lm_head.bias"),
        (
            without(f"{LAYER}.block_sparse_moe.experts.5.w3.weight"),
            f"misses {LAYER}.block_sparse_moe.experts.5.w3",
        ),
        (replaced("lm_head.bias", torch.ones(64)), r"lm_head.bias has shape \[64\], expected \[320\]"),
        (
            replaced(f"{LAYER}.block_sparse_moe.gate.bias", torch.ones(6)),
            f"has unknown {LAYER}.block_sparse_moe.gate.bias",
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
        ({"num_experts_per_tok": 4}, "num_experts_per_tok 4 is not supported, only 2"),
        ({"num_local_experts": 1}, "num_local_experts must be between 2"),
        ({"router_jitter_noise": 0}, "router_jitter_noise must be positive"),
        ({"sliding_window": 0}, "sliding_window must be between"),
        ({"lm_head_bias": "yes"}, "lm_head_bias must be true or false"),
        ({"rope_parameters": {**ROPE, "short_factor": [1.0]}}, "short_factor must be a list of 4 numbers"),
        (
            {"rope_parameters": {**ROPE, "long_factor": [1.0, 2.0, 0, 4.0]}},
            r"long_factor\[2\] must be positive",
        ),
        ({"rope_parameters": {**ROPE, "long_mscale": "big"}}, "long_mscale must be a number"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(PhimoeConfig(**PHI_3_5_MOE).to_json_string())
    assert "rope_scaling" not in new
    assert phimoe.read_config(new) == phimoe.read_config(PHI_3_5_MOE)


def test_the_published_model_has_as_many_parameters_as_it_says() -> None:
    config = phimoe.read_config(PHI_3_5_MOE)
    assert (config.num_experts, config.expert_ffn_size, config.jitter) == (16, 6400, 0.01)
    assert (config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim) == (32, 8, 128)
    assert (config.sliding_window, config.attention_bias, config.head_bias) == (None, True, True)
    scale = PHI_3_5_MOE["rope_scaling"]["long_mscale"]
    assert config.rope.scaling == LongRopeScaling(tuple(SHORT), tuple(LONG), 4096, scale, scale)
    assert f"{count_parameters(phimoe.weight_map(config)) / 1e9:.1f}" == "41.9"
