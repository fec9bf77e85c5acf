"""gpt-oss: its layouts, its windows, and what its config says. What it computes is in `test_families.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import parity
from published import GPT_OSS_20B
from tampering import Tensors, assert_tensors_refused, edit_config, replaced, rewrite, without
from tiny import FAMILIES, forward_all
from toptwo.errors import StartupError
from toptwo.models import gpt_oss
from toptwo.models.registry import read_config
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["gpt_oss"]
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1000.0}
SLIDING, FULL = "sliding_attention", "full_attention"

SHAPES: dict[str, dict[str, Any]] = {
    "windows in other layers": {"layer_types": [FULL, SLIDING, SLIDING]},
    "no windows": {"layer_types": [FULL] * 3},
    "a window of a single token": {"sliding_window": 1},
    "no biases in attention": {"attention_bias": False},
    "the released limit": {"swiglu_limit": 7.0},
    "a single expert of five": {"num_local_experts": 5, "num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 6},
    "tied embeddings": {"tie_word_embeddings": True},
    "no stretched context": {"rope_parameters": PLAIN},
    "whole dimensions to blend between": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def as_decoded_blocks(tensors: Tensors) -> Tensors:
    """What an MXFP4 checkpoint is decoded to: rows of weights, not columns, gates and ups still in turn."""
    return {
        f"{name}_blocks" if name.endswith("_proj") else name: tensor.transpose(1, 2)
        if name.endswith("_proj")
        else tensor
        for name, tensor in tensors.items()
    }


def as_in_gguf(tensors: Tensors) -> Tensors:
    """Gates and ups apart, and all names with an ending."""
    changed: Tensors = {}
    for name, tensor in tensors.items():
        stack = name.rsplit(".", 1)[0]
        if name.endswith("gate_up_proj"):
            changed[f"{stack}.gate_proj.weight"] = tensor[..., ::2].transpose(1, 2)
            changed[f"{stack}.up_proj.weight"] = tensor[..., 1::2].transpose(1, 2)
        elif name.endswith("gate_up_proj_bias"):
            changed[f"{stack}.gate_proj.bias"] = tensor[..., ::2]
            changed[f"{stack}.up_proj.bias"] = tensor[..., 1::2]
        elif name.endswith("down_proj"):
            changed[f"{name}.weight"] = tensor.transpose(1, 2)
        elif name.endswith("down_proj_bias"):
            changed[f"{stack}.down_proj.bias"] = tensor
        else:
            changed[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return changed


@pytest.mark.parametrize("layout", [as_decoded_blocks, as_in_gguf])
def test_all_layouts_load_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    expected = forward_all(tmp_path, [1, 2, 3], backend="cpu")
    rewrite(tmp_path, layout)
    assert torch.equal(forward_all(tmp_path, [1, 2, 3], backend="cpu"), expected)


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
SINKS = "model.layers.0.self_attn.sinks"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(GATE_UP), f"misses {GATE_UP}$"),
        (without(f"{GATE_UP}_bias"), f"misses {GATE_UP}_bias$"),
        (without(SINKS), f"misses {SINKS}$"),
        (without("model.layers.2.mlp.router.bias"), r"misses model\.layers\.2\.mlp\.router\.bias"),
        (
            replaced("model.layers.0.mlp.gate.weight", torch.zeros(6, 64)),
            r"unknown model\.layers\.0\.mlp\.gate",
        ),
        (replaced(SINKS, torch.zeros(2)), rf"{SINKS} has shape \[2\], expected \[8\]"),
        (
            replaced(GATE_UP, torch.zeros(6, 96, 64)),
            rf"{GATE_UP} has shape \[6, 96, 64\] and gives \[6, 64, 96\]",
        ),
        (replaced(GATE_UP, torch.zeros(6, 64, 95)), rf"{GATE_UP} has shape .* cannot be part of"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    FAMILY.write(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


def test_attention_biases_that_the_config_denies_are_unknown(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    edit_config(tmp_path, attention_bias=False)
    with pytest.raises(StartupError, match=r"unknown model\.layers\.0\.self_attn\.k_proj\.bias"):
        forward_all(tmp_path, [1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha 1.0 is not supported"),
        ({"swiglu_limit": 0.0}, "swiglu_limit must be positive"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok must be between 1 and 32"),
        ({"num_local_experts": None}, "num_local_experts must be an integer"),
        ({"layer_types": [SLIDING]}, "layer_types must be a list of 24 texts"),
        ({"layer_types": SLIDING}, "layer_types must be a list of 24 texts"),
        ({"layer_types": [FULL] * 23 + ["linear_attention"]}, r"layer_types\[23\] 'linear_attention' is not"),
        ({"layer_types": [[]] * 24}, r"layer_types\[0\] \[\] is not supported"),
        ({"sliding_window": -1}, "sliding_window must be between"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
    ],
)
def test_a_wrong_config_value_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        gpt_oss.read_config({**GPT_OSS_20B, **changes})
    assert "config.json" in str(caught.value)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    old = gpt_oss.read_config(GPT_OSS_20B)
    rope = {**GPT_OSS_20B["rope_scaling"], "rope_theta": 150_000}
    new = {name: value for name, value in GPT_OSS_20B.items() if name not in ("rope_theta", "rope_scaling")}
    assert gpt_oss.read_config({**new, "rope_parameters": rope, "swiglu_alpha": 1.702}) == old
    # What both leave out when a config does.
    short = {name: value for name, value in new.items() if name not in ("layer_types", "sliding_window")}
    assert gpt_oss.read_config(short) == old


def test_a_config_that_transformers_writes_says_what_it_was_made_of(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    config = read_config(tmp_path)[1]
    assert isinstance(config, gpt_oss.GptOssConfig)
    assert config.windows == (24, None, 24)
    assert (config.swiglu_limit, config.attention_bias, config.heads.head_dim) == (1.0, True, 16)


@pytest.mark.parametrize(
    ("layers", "experts", "billions"), [(24, 32, 20.91), (36, 128, 116.83)], ids=["20b", "120b"]
)
def test_the_released_models_have_their_published_size(layers: int, experts: int, billions: float) -> None:
    shape = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": None}
    config = gpt_oss.read_config({**GPT_OSS_20B, **shape})
    total = sum(math.prod(spec.shape) for spec in gpt_oss.weight_map(config))
    assert round(total / 1e9, 2) == billions
    assert config.windows[:2] == (128, None)
    assert config.heads.num_heads * config.heads.head_dim == 4096
