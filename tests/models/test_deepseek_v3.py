"""DeepSeek-V3: where it differs from V2. What it computes is in `test_families.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import parity
from tampering import Tensors, edit_config, fuse_experts, rewrite, stack_experts, without
from tiny import FAMILIES, forward_all
from toptwo.errors import StartupError
from toptwo.models import deepseek_v3
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["deepseek_v3"]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

SHAPES: dict[str, dict[str, Any]] = {
    "queries by one matrix": {"q_lora_rank": None},
    "neighbours do not turn together": {"rope_interleave": False},
    "weights as they are": {"norm_topk_prob": False},
    "a single group": {"n_group": 1, "topk_group": 1},
    "a single expert": {"num_experts_per_tok": 1, "topk_group": 1},
    "no dense layer": {"first_k_dense_replace": 0},
    "an epsilon that is not for the norms in attention": {"rms_norm_eps": 0.1},
    "two shared experts": {"n_shared_experts": 2},
}

V3: dict[str, Any] = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "attention_bias": False,
    "max_position_embeddings": 163_840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
MOONLIGHT = {
    "vocab_size": 163_840,
    "hidden_size": 2048,
    "intermediate_size": 11_264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "max_position_embeddings": 8192,
    "rope_theta": 50_000.0,
    "rope_scaling": None,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def with_the_bias_named_as_in_gguf(tensors: Tensors) -> Tensors:
    return {
        name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor
        for name, tensor in stack_experts(tensors).items()
    }


def with_a_layer_for_further_tokens(tensors: Tensors) -> Tensors:
    """Which has weights of all kinds, and is as large as another one."""
    extra = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.2." in name
    }
    names = ("eh_proj", "enorm", "hnorm", "shared_head.head", "shared_head.norm", "embed_tokens")
    return tensors | extra | {f"model.layers.3.{name}.weight": torch.ones(1) for name in names}


@pytest.mark.parametrize(
    "layout",
    [stack_experts, fuse_experts, with_the_bias_named_as_in_gguf, with_a_layer_for_further_tokens],
)
def test_all_layouts_load_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    expected = forward_all(tmp_path, [1, 2, 3], backend="cpu")
    rewrite(tmp_path, layout)
    assert torch.equal(forward_all(tmp_path, [1, 2, 3], backend="cpu"), expected)


def test_no_more_layers_are_left_out_than_the_config_says(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    rewrite(tmp_path, with_a_layer_for_further_tokens)
    edit_config(tmp_path, num_mtp_layers=0)
    with pytest.raises(StartupError, match=r"unknown model\.layers\.3\.eh_proj\.weight"):
        forward_all(tmp_path, [1])


def test_the_bias_decides_who_is_chosen_and_not_how_much(tmp_path: Path) -> None:
    reference = FAMILY.write(tmp_path)
    assert BIAS in load_file(tmp_path / "model.safetensors")
    with torch.inference_mode():
        expected = reference(parity.PROMPT)
    rewrite(tmp_path, lambda t: t | {BIAS: torch.linspace(-3, 3, 8)})
    pulled = parity.prompt_logits(tmp_path, [70], backend="reference")
    assert (pulled - expected).abs().max() > 0.1
    # The same for all experts, it changes nothing.
    original = parity.prompt_logits(tmp_path, [70], backend="reference")
    rewrite(tmp_path, lambda t: t | {BIAS: t[BIAS] + 8})
    shifted = parity.prompt_logits(tmp_path, [70], backend="reference")
    torch.testing.assert_close(shifted, original, atol=1e-5, rtol=0)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    rewrite(tmp_path, without(BIAS))
    with pytest.raises(StartupError, match=f"misses {BIAS}$"):
        forward_all(tmp_path, [1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_interleave": "yes"}, "rope_interleave must be true or false"),
        ({"n_group": 7}, "n_group or topk_group is wrong: 4 of 7 groups"),
        ({"n_group": 256, "topk_group": 8}, "a group scored by its best two experts holds at least two"),
        ({"topk_group": 9}, "n_group or topk_group is wrong: 9 of 8 groups"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be between"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be positive"),
    ],
)
def test_a_wrong_config_value_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        deepseek_v3.read_config({**V3, **changes})
    assert "config.json" in str(caught.value)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    old = deepseek_v3.read_config(V3)
    moved = ("rope_theta", "rope_scaling", "num_nextn_predict_layers")
    new = {name: value for name, value in V3.items() if name not in moved}
    rope = {**V3["rope_scaling"], "rope_theta": 10_000, "rope_type": "yarn"}
    assert deepseek_v3.read_config({**new, "rope_parameters": rope, "num_mtp_layers": 1}) == old


@pytest.mark.parametrize(
    ("changes", "billions"), [({}, 671.03), (MOONLIGHT, 15.96)], ids=["V3", "Moonlight-16B-A3B"]
)
def test_the_released_models_have_their_published_size(changes: dict[str, Any], billions: float) -> None:
    config = deepseek_v3.read_config({**V3, **changes})
    total = sum(math.prod(spec.shape) for spec in deepseek_v3.weight_map(config))
    assert round(total / 1e9, 2) == billions
    assert config.kv_shape.kv_size == 512 + 64
