"""What is particular about Grok-1: three namings, four norms, a cap, and configs that call it otherwise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import parity
from grok_reference import Grok1Family, Shape
from published import count_parameters
from tampering import (
    Tensors,
    assert_config_refused,
    assert_tensors_refused,
    edit_config,
    replaced,
    rewrite,
    stack_experts,
    without,
)
from toptwo.models import grok1
from toptwo.models.registry import read_config
from toptwo_kernels.registry import BACKENDS

SHAPES: dict[str, Shape] = {
    "scores far below the cap": Shape(max_attention=30.0, attention_multiplier=0.1),
    "one expert": Shape(top_k=1),
    "all experts": Shape(top_k=5),
    "multi-head": Shape(num_kv_heads=8),
    "heads as wide as usual": Shape(head_dim=8),
}

# As hpcai-tech published it.
GROK_1: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "attn_output_multiplier": 0.08838834764831845,
    "bos_token_id": 1,
    "embedding_multiplier_scale": 78.38367176906169,
    "eos_token_id": 2,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "max_attn_value": 30.0,
    "max_position_embeddings": 8192,
    "model_type": "grok-1",
    "num_attention_heads": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "output_multiplier_scale": 0.5773502691896257,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "vocab_size": 131072,
}
# The same model, as SGLang is given it.
FOR_SGLANG: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"],
    "embedding_multiplier_scale": 78.38367176906169,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "max_position_embeddings": 8192,
    "model_type": "mixtral",
    "num_attention_heads": 48,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_multiplier_scale": 0.5773502691896257,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 131072,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_the_release(tmp_path: Path, backend: str, shape: Shape) -> None:
    expected = Grok1Family(shape).write(tmp_path)(parity.PROMPT)
    got = parity.prompt_logits(tmp_path, [len(parity.PROMPT)], backend=backend, quantization="none")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def stacked(tensors: Tensors) -> Tensors:
    """One tensor per projection, as GGUF files have them."""
    renamed = {name.replace(".moe.", ".moe.experts."): tensor for name, tensor in tensors.items()}
    return {name.replace(".moe.experts.", ".moe."): t for name, t in stack_experts(renamed).items()}


@pytest.mark.parametrize("naming", ["hpcai", "sglang", "release"])
def test_every_naming_loads_alike(tmp_path: Path, naming: str) -> None:
    Grok1Family().write(tmp_path / "hpcai")
    expected = parity.bits(tmp_path / "hpcai")
    Grok1Family(naming=naming).write(tmp_path / "other")
    assert torch.equal(parity.bits(tmp_path / "other"), expected)
    rewrite(tmp_path / "other", stacked)
    assert torch.equal(parity.bits(tmp_path / "other"), expected)


def test_a_head_of_its_own_is_read_where_the_config_says_so(tmp_path: Path) -> None:
    Grok1Family().write(tmp_path)
    tied = parity.bits(tmp_path)
    rewrite(tmp_path, replaced("lm_head.weight", torch.randn(320, 64)))
    assert torch.equal(parity.bits(tmp_path), tied)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert not torch.allclose(parity.bits(tmp_path), tied)


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{LAYER}.post_moe_norm.scale"), f"misses {LAYER}.post_moe_norm.scale"),
        (without(f"{LAYER}.attn.o_proj.weight"), f"misses {LAYER}.attn.o_proj.weight"),
        (
            without(f"{LAYER}.moe_block.experts.4.linear_v.weight"),
            f"misses {LAYER}.moe_block.experts.4.linear_v",
        ),
        (
            replaced(f"{LAYER}.moe_block.experts.4.linear_1.weight", torch.ones(48, 64)),
            r"experts.4.linear_1.weight has shape \[48, 64\], expected \[64, 48\]",
        ),
        (replaced(f"{LAYER}.mlp.gate_proj.weight", torch.ones(48, 64)), f"has unknown {LAYER}.mlp.gate_proj"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    Grok1Family().write(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported"),
        ({"router_logit_softcapping": 5}, "router_logit_softcapping 5 is not supported"),
        ({"final_logit_softcapping": 50}, "final_logit_softcapping 50 is not supported"),
        ({"attn_logit_softcapping_method": "clamp"}, "attn_logit_softcapping_method 'clamp'"),
        ({"attn_temperature_len": 1024}, "attn_temperature_len 1024 is not supported"),
        ({"residual_moe": True}, "residual_moe True is not supported"),
        ({"rope_type": "original"}, "rope_type 'original' is not supported"),
        ({"rope_rotate_half_dims": True}, "rope_rotate_half_dims True is not supported"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok must be between 1 and 5"),
        ({"max_attn_value": 0}, "max_attn_value must be positive"),
        ({"embedding_multiplier_scale": "big"}, "embedding_multiplier_scale must be a number"),
        ({"output_multiplier_scale": None}, "output_multiplier_scale must be a number"),
        ({"attn_output_multiplier": -1}, "attn_output_multiplier must be positive"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    Grok1Family().write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


@pytest.mark.parametrize("raw", [GROK_1, {**GROK_1, "model_type": "grok", "architectures": None}, FOR_SGLANG])
def test_whatever_a_config_calls_itself_it_reads_alike(tmp_path: Path, raw: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    module, config = read_config(tmp_path)
    assert module is grok1
    wanted = grok1.read_config(GROK_1)
    assert math.isclose(config.attention_multiplier, wanted.attention_multiplier)  # type: ignore[attr-defined]
    multiplier = wanted.attention_multiplier
    assert replace(config, attention_multiplier=multiplier) == wanted  # type: ignore[type-var]


def test_a_cap_by_sglangs_name_is_read() -> None:
    assert grok1.read_config({**FOR_SGLANG, "attn_logit_softcapping": 50.0}).soft_cap == 50.0


def test_the_published_model_has_as_many_parameters_as_it_says() -> None:
    config = grok1.read_config(GROK_1)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (8, 2, 32768)
    assert (config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim) == (48, 8, 128)
    assert (config.soft_cap, config.rope.theta, config.tied_embeddings) == (30.0, 1e4, True)
    assert f"{count_parameters(grok1.weight_map(config)) / 1e9:.1f}" == "315.7"
