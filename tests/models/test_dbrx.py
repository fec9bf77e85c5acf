"""What is particular about DBRX: a nested config, clipping, and experts stacked row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DbrxConfig

import parity
from published import DBRX, count_parameters
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
from toptwo.models import dbrx
from toptwo_kernels.registry import BACKENDS

FAMILY = FAMILIES["dbrx"]
ATTENTION = FAMILY.shape["attn_config"]
FFN = FAMILY.shape["ffn_config"]
HIDDEN, FFN_SIZE, EXPERTS = 64, 48, 6

SHAPES: dict[str, dict[str, Any]] = {
    "clipped hard": {"attn_config": {**ATTENTION, "clip_qkv": 0.1}},
    "one expert": {"ffn_config": {**FFN, "moe_top_k": 1}},
    "all experts": {"ffn_config": {**FFN, "moe_top_k": 6}},
    "multi-query": {"attn_config": {**ATTENTION, "kv_n_heads": 1}},
    "wide experts": {"ffn_config": {**FFN, "ffn_hidden_size": 96}},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    parity.assert_agreement(tmp_path, FAMILY.write(tmp_path, **overrides), backend)


def test_nothing_is_clipped_where_the_config_names_no_bound(tmp_path: Path) -> None:
    FAMILY.write(tmp_path)
    clipped = parity.bits(tmp_path)
    edit_config(tmp_path, attn_config={**ATTENTION, "clip_qkv": 1e9})
    far = parity.bits(tmp_path)
    edit_config(tmp_path, attn_config={**ATTENTION, "clip_qkv": None})
    assert torch.equal(parity.bits(tmp_path), far)
    assert not torch.allclose(far, clipped)


def by_expert(tensors: Tensors) -> Tensors:
    """w1 and v1 [E, F, H], w2 [E, H, F], and all else."""
    made = {}
    for name, tensor in tensors.items():
        if ".experts.mlp." in name:
            stack = tensor.view(EXPERTS, FFN_SIZE, HIDDEN)
            made[name] = stack.transpose(1, 2) if name.endswith("w2") else stack
        else:
            made[name] = tensor
    return made


def stacked(tensors: Tensors) -> Tensors:
    """One 3-D tensor per projection, as GGUF files have them."""
    return {f"{n}.weight" if ".experts." in n else n: t for n, t in by_expert(tensors).items()}


def split(tensors: Tensors) -> Tensors:
    """A tensor per expert, and one each for queries, keys and values."""
    made: Tensors = {}
    for name, tensor in by_expert(tensors).items():
        stack, _, last = name.rpartition(".")
        if ".experts." in name:
            made |= {f"{stack}.{expert}.{last}.weight": each for expert, each in enumerate(tensor)}
        elif ".Wqkv." in name:
            parts = zip("qkv", tensor.split([64, 16, 16]), strict=True)
            made |= {name.replace("Wqkv", f"{letter}_proj"): rows for letter, rows in parts}
        else:
            made[name] = tensor
    return made


@pytest.mark.parametrize("layout", [stacked, split])
def test_every_layout_loads_alike(tmp_path: Path, layout: Any) -> None:
    FAMILY.write(tmp_path)
    released = parity.bits(tmp_path)
    rewrite(tmp_path, layout)
    assert torch.equal(parity.bits(tmp_path), released)


BLOCK = "transformer.blocks.1"
MLP = f"{BLOCK}.ffn.experts.mlp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{MLP}.v1"), f"misses {MLP}.v1"),
        (without(f"{BLOCK}.norm_attn_norm.attn.Wqkv.weight"), f"misses {BLOCK}.norm_attn_norm.attn.Wqkv"),
        (without("lm_head.weight"), "misses lm_head.weight"),
        (
            replaced(f"{BLOCK}.norm_attn_norm.norm_2.bias", torch.ones(HIDDEN)),
            f"has unknown {BLOCK}.norm_attn_norm.norm_2.bias",
        ),
        (
            replaced(f"{MLP}.w2", torch.ones(HIDDEN * EXPERTS, HIDDEN)),
            rf"{MLP}.w2 has shape \[384, 64\], which cannot be part of layers.1.down \[6, 64, 48\]",
        ),
        (
            replaced(f"{BLOCK}.ffn.router.layer.weight", torch.ones(7, HIDDEN)),
            r"router.layer.weight has shape \[7, 64\], expected \[6, 64\]",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    FAMILY.write(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ffn_config": {**FFN, "moe_normalize_expert_weights": 2}},
            "ffn_config: moe_normalize_expert_weights 2",
        ),
        (
            {"ffn_config": {**FFN, "moe_normalize_expert_weights": None}},
            "weights null is not supported, only 1",
        ),
        ({"ffn_config": {**FFN, "ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn: name 'gelu' is not supported"),
        ({"ffn_config": {**FFN, "moe_top_k": 7}}, "ffn_config: moe_top_k must be between 1 and 6"),
        ({"ffn_config": []}, "ffn_config must be an object"),
        ({"attn_config": {**ATTENTION, "clip_qkv": 0}}, "attn_config: clip_qkv must be positive"),
        ({"attn_config": {**ATTENTION, "kv_n_heads": 3}}, "attn_config: kv_n_heads must divide n_heads"),
        ({"attn_config": {**ATTENTION, "rope_theta": "big"}}, "attn_config: rope_theta must be a number"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"d_model": None}, "d_model must be an integer"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    FAMILY.write(tmp_path)
    assert_config_refused(tmp_path, changes, words)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    new = json.loads(DbrxConfig(**DBRX).to_json_string())
    assert new["rope_parameters"]["rope_theta"] == 10_000  # which is not the model's
    assert dbrx.read_config(new) == dbrx.read_config(DBRX)


def test_the_published_model_has_as_many_parameters_as_it_says() -> None:
    config = dbrx.read_config(DBRX)
    assert (config.num_experts, config.experts_per_token, config.expert_ffn_size) == (16, 4, 10752)
    assert (config.heads.num_heads, config.heads.num_kv_heads, config.heads.head_dim) == (48, 8, 128)
    assert (config.rope.theta, config.rope.scaling, config.max_position) == (5e5, None, 32768)
    assert (config.clip_qkv, config.norm_eps) == (8.0, 1e-5)
    assert f"{count_parameters(dbrx.weight_map(config)) / 1e9:.1f}" == "131.6"
