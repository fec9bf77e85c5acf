"""DeepSeek-V2: its layouts, its variants, and its config. What it computes is in `test_families.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import parity
from published import DEEPSEEK_V2_LITE
from tampering import (
    Tensors,
    assert_tensors_refused,
    edit_config,
    fuse_experts,
    replaced,
    rewrite,
    stack_experts,
    without,
)
from tiny import FAMILIES, forward_all
from toptwo.errors import StartupError
from toptwo.models import deepseek_v2
from toptwo.models.registry import read_config
from toptwo.runtime.kv_cache import kv_bytes_per_token
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["deepseek_v2"]
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "original_max_position_embeddings": 64}

SHAPES: dict[str, dict[str, Any]] = {
    "queries by one matrix": {"q_lora_rank": None},
    "chosen out of all experts": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "a single group": {"topk_group": 1, "n_group": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "only dense layers": {"first_k_dense_replace": 3},
    "no stretched context": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "a stretched context without its own slopes": {"rope_parameters": YARN},
    "a slope for all dimensions alone": {"rope_parameters": {**YARN, "mscale_all_dim": 0.707}},
    "slopes that cancel out": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "an epsilon that is not for the norms in attention": {"rms_norm_eps": 0.1},
    "tied embeddings": {"tie_word_embeddings": True},
}

FULL_SIZE = {
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def split_keys_from_values(tensors: Tensors) -> Tensors:
    """As newer GGUF files hold them: [N, C, D] and [N, V, C]."""
    changed = stack_experts(tensors)
    for name in [name for name in changed if name.endswith("kv_b_proj.weight")]:
        both = changed.pop(name).view(8, 24 + 32, 48)
        changed[name.replace("kv_b_proj", "k_b_proj")] = both[:, :24].transpose(1, 2)
        changed[name.replace("kv_b_proj", "v_b_proj")] = both[:, 24:]
    return changed


@pytest.mark.parametrize("layout", [stack_experts, fuse_experts, split_keys_from_values])
def test_all_layouts_load_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    expected = forward_all(tmp_path, [1, 2, 3], backend="cpu")
    rewrite(tmp_path, layout)
    assert torch.equal(forward_all(tmp_path, [1, 2, 3], backend="cpu"), expected)


ATTENTION = "model.layers.1.self_attn"
MOE = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{ATTENTION}.kv_b_proj.weight"), rf"misses {ATTENTION}\.kv_b_proj\.weight$"),
        (without(f"{ATTENTION}.q_a_layernorm.weight"), rf"misses {ATTENTION}\.q_a_layernorm\.weight$"),
        (without(f"{MOE}.experts.5.up_proj.weight"), rf"misses {MOE}\.experts\.5\.up_proj\.weight$"),
        (without(f"{MOE}.shared_experts.down_proj.weight"), rf"misses {MOE}\.shared_experts\.down_proj"),
        (replaced(f"{ATTENTION}.q_proj.weight", torch.zeros(320, 64)), rf"unknown {ATTENTION}\.q_proj"),
        (
            replaced(f"{ATTENTION}.q_b_proj.weight", torch.zeros(312, 40)),
            r"\[312, 40\] and gives .*, expected \[",
        ),
        (
            replaced(f"{ATTENTION}.kv_b_proj.weight", torch.zeros(447, 48)),
            "kv_b_proj.weight has shape .* cannot",
        ),
        (
            replaced("model.layers.3.mlp.up_proj.weight", torch.zeros(96, 64)),
            r"unknown model\.layers\.3\.mlp",
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
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok must be an integer"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok must be between 1 and 64"),
        ({"n_shared_experts": None}, "n_shared_experts must be an integer"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim must be between"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be between"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be between"),
        (
            {"topk_method": "group_limited_greedy", "n_group": 7},
            "n_group or topk_group is wrong: 1 of 7 groups",
        ),
        (
            {"topk_method": "group_limited_greedy", "n_group": 64},
            "n_group or .* 1 groups do not hold 6 experts",
        ),
        ({"topk_method": "group_limited_greedy", "n_group": None}, "n_group must be an integer"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 0}},
            "mscale_all_dim must be positive",
        ),
    ],
)
def test_a_wrong_config_value_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        deepseek_v2.read_config({**DEEPSEEK_V2_LITE, **changes})
    assert "config.json" in str(caught.value)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    old = deepseek_v2.read_config(DEEPSEEK_V2_LITE)
    rope = {**DEEPSEEK_V2_LITE["rope_scaling"], "rope_theta": 10_000, "rope_type": "yarn"}
    new = {
        name: value for name, value in DEEPSEEK_V2_LITE.items() if name not in ("rope_theta", "rope_scaling")
    }
    assert deepseek_v2.read_config({**new, "rope_parameters": rope, "head_dim": 64}) == old


def test_chosen_weights_are_renormalised_or_scaled_but_not_both() -> None:
    scaled = deepseek_v2.read_config({**DEEPSEEK_V2_LITE, **FULL_SIZE}).routing
    assert (scaled.renormalize, scaled.scale) == (False, 16.0)
    renormalized = deepseek_v2.read_config({**DEEPSEEK_V2_LITE, **FULL_SIZE, "norm_topk_prob": True}).routing
    assert (renormalized.renormalize, renormalized.scale) == (True, 1.0)


def test_experts_may_be_in_every_so_manieth_layer(tmp_path: Path) -> None:
    config = deepseek_v2.read_config({**DEEPSEEK_V2_LITE, "num_hidden_layers": 8, "moe_layer_freq": 3})
    assert config.sparse_layers == {3, 6}
    names = {spec.name for spec in deepseek_v2.weight_map(config)}
    assert "layers.6.router" in names
    assert "layers.7.router" not in names
    # A dense layer in place of a sparse one is another model, as its checkpoint shows.
    FAMILY.write(tmp_path)
    edit_config(tmp_path, moe_layer_freq=2)
    with pytest.raises(StartupError, match=r"misses model\.layers\.1\.mlp\.down_proj\.weight"):
        forward_all(tmp_path, [1])


@pytest.mark.parametrize(("changes", "billions"), [({}, 15.71), (FULL_SIZE, 235.74)], ids=["V2-Lite", "V2"])
def test_the_released_models_have_their_published_size(changes: dict[str, Any], billions: float) -> None:
    config = deepseek_v2.read_config({**DEEPSEEK_V2_LITE, **changes})
    total = sum(math.prod(spec.shape) for spec in deepseek_v2.weight_map(config))
    assert round(total / 1e9, 2) == billions
    # The paper's point: what all heads share is all that a token costs.
    assert kv_bytes_per_token(config, torch.float16) == config.num_layers * (512 + 64) * 2


def test_attention_is_sharpened_in_a_stretched_context() -> None:
    plain = deepseek_v2.read_config({**DEEPSEEK_V2_LITE, "rope_scaling": None})
    assert plain.attention_scale == pytest.approx(192**-0.5)
    stretched = deepseek_v2.read_config(DEEPSEEK_V2_LITE)
    assert stretched.attention_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_a_config_that_transformers_writes_says_what_it_was_made_of(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    config = read_config(tmp_path)[1]
    assert isinstance(config, deepseek_v2.DeepseekConfig)
    assert config.kv_shape.kv_size == 48 + 16
    assert (config.routing.num_groups, config.routing.top_groups, config.routing.scale) == (4, 2, 1.5)
    assert (config.sparse_layers, config.shared_ffn_size) == ({1, 2}, 80)
