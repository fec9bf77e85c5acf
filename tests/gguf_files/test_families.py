"""Every family out of a GGUF file as the converter of llama.cpp writes it: config and weights come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Format
from safetensors.torch import load_file, save_file

import parity
from gguf_files.loading import assert_same_model, load, stand_for
from llama_cpp import Options, write_gguf
from tiny import FAMILIES
from toptwo.errors import CheckpointError

# What no GGUF file says is what every released model has.
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"mscale": 0.7},
    "deepseek_v3": {"mscale": 0.7},
    "gpt_oss": {"swiglu_limit": 7.0},
    "phimoe": {
        "router_jitter_noise": 0.01,
        "original_max_position_embeddings": 128,
        "short_mscale": 1.243163121016122,
        "long_mscale": 1.243163121016122,
    },
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
}
OF_ROPE = {"mscale", "original_max_position_embeddings", "short_mscale", "long_mscale"}


def write(family: str, directory: Path, **overrides: Any) -> parity.Reference:
    directory.mkdir()
    given = {**SHAPES.get(family, {}), **overrides}
    rope = {key: value for key, value in given.items() if key in OF_ROPE}
    given = {key: value for key, value in given.items() if key not in OF_ROPE}
    if rope:
        given["rope_parameters"] = FAMILIES[family].shape["rope_parameters"] | rope
    reference: parity.Reference = FAMILIES[family].write(directory, **given)
    return reference


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_weights_come_back(family: str, tmp_path: Path) -> None:
    write(family, tmp_path / "original")
    write_gguf(tmp_path / "original", tmp_path / "a.gguf")
    assert_same_model(tmp_path / "original", stand_for(tmp_path / "a.gguf"))


@pytest.mark.parametrize("kind", [Format.F16, Format.BF16])
def test_half_precision_comes_back(kind: Format, tmp_path: Path) -> None:
    write("mixtral", tmp_path / "original")
    path = tmp_path / "original" / "model.safetensors"
    dtype = torch.float16 if kind is Format.F16 else torch.bfloat16
    halves = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    whole = {name: weight.float() for name, weight in halves.items()}
    save_file(whole, path, {"format": "pt"})
    write_gguf(tmp_path / "original", tmp_path / "a.gguf", Options(kind=lambda *_: kind))
    assert_same_model(tmp_path / "original", directory := stand_for(tmp_path / "a.gguf"))
    assert {weight.dtype for weight in load(directory)[1].values() if weight.dim() == 3} == {dtype}


@pytest.mark.parametrize(
    ("family", "options", "overrides"),
    [
        pytest.param("mixtral", Options(merged_experts=False), {}, id="a tensor per expert"),
        pytest.param("mixtral", Options(), {"tie_word_embeddings": True}, id="tied head"),
        pytest.param("mixtral", Options(), {"head_dim": 16}, id="head_dim"),
        pytest.param("deepseek_v2", Options(merged_latent=True), {}, id="keys and values in one tensor"),
        pytest.param("deepseek_v2", Options(), {"q_lora_rank": None}, id="queries from one matrix"),
        pytest.param(
            "deepseek_v2",
            Options(),
            {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
            id="no groups",
        ),
        pytest.param(
            "deepseek_v3",
            Options(
                extra=("blk.3.nextn.eh_proj.weight", "blk.3.attn_norm.weight", "rope_freqs.weight"),
                metadata={"deepseek2.nextn_predict_layers": 1, "deepseek2.block_count": 4},
            ),
            {},
            id="further layers",
        ),
        pytest.param("llama", Options(split_max_tensors=7), {}, id="in parts"),
        pytest.param("llama", Options(metadata={"general.alignment": 64}), {}, id="alignment"),
        pytest.param(
            "llama",
            Options(),
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
            id="linear scaling",
        ),
        pytest.param("granitemoe", Options(), {"attention_bias": False}, id="no biases"),
        pytest.param("phimoe", Options(), {"attention_bias": False, "lm_head_bias": False}, id="few biases"),
    ],
)
def test_so_do_variants(family: str, options: Options, overrides: dict[str, Any], tmp_path: Path) -> None:
    write(family, tmp_path / "original", **overrides)
    write_gguf(tmp_path / "original", tmp_path / "a.gguf", options)
    first = next(path for path in sorted(tmp_path.glob("a*.gguf")))
    assert_same_model(tmp_path / "original", stand_for(first))


def test_llama_3s_scaling_is_in_the_file_as_its_outcome(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write("llama", tmp_path / "original", rope_parameters=rope, head_dim=32)
    write_gguf(tmp_path / "original", tmp_path / "a.gguf")
    (expected, _), (config, _) = load(tmp_path / "original"), load(stand_for(tmp_path / "a.gguf"))
    ours, theirs = (c.rope.tables(512, 32) for c in (config, expected))
    torch.testing.assert_close(ours.cos_LD, theirs.cos_LD, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.sin_LD, theirs.sin_LD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_model_computes_what_it_should(family: str, tmp_path: Path) -> None:
    """Against an independent implementation, which has seen no GGUF file."""
    reference = write(family, tmp_path / "original")
    write_gguf(tmp_path / "original", tmp_path / "a.gguf")
    with torch.inference_mode():
        expected = reference(parity.PROMPT).float()
        directory = stand_for(tmp_path / "a.gguf")
        found = parity.prompt_logits(directory, [len(parity.PROMPT)], backend="reference")
    assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "llama",
            {"general.architecture": "gemma3"},
            "general.architecture 'gemma3' is not supported",
        ),
        ("llama", {"llama.block_count": 10**9}, "llama.block_count gives 1000000000 layers, and 30 tensors"),
        ("llama", {"llama.block_count": "3"}, "llama.block_count must be an integer, not '3'"),
        (
            "llama",
            {"llama.rope.dimension_count": 4},
            "llama.rope.dimension_count is 4: only whole",
        ),
        (
            "llama",
            {"llama.rope.scaling.type": "dynamic"},
            "llama.rope.scaling.type 'dynamic' is not",
        ),
        ("llama", {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor is missing"),
        (
            "granitemoe",
            {"granitemoe.rope.scaling.finetuned": False},
            "granitemoe.rope.scaling.finetuned is",
        ),
        (
            "granitemoe",
            {"granitemoe.expert_shared_feed_forward_length": 8},
            "granitemoe.expert_shared_feed_forward_length is not supported",
        ),
    ],
)
def test_a_file_that_is_not_supported_is_named(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(family, tmp_path / "original")
    write_gguf(tmp_path / "original", tmp_path / "a.gguf", Options(metadata=change))
    with pytest.raises(CheckpointError, match=rf"a\.gguf: {message}"):
        stand_for(tmp_path / "a.gguf")


def test_missing_metadata_and_tensors_are_named(tmp_path: Path) -> None:
    write("llama", tmp_path / "original")
    write_gguf(tmp_path / "original", tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    for number, (old, new, message) in enumerate(
        [
            (b"llama.context_length", b"llama.context_breadth"[:20], "llama.context_length is missing"),
            (b"token_embd.weight", b"token_embd.wheels", "tensor token_embd.weight is missing"),
        ]
    ):
        (path := tmp_path / f"{number}.gguf").write_bytes(content.replace(old, new))
        with pytest.raises(CheckpointError, match=rf"{number}\.gguf: {message}"):
            stand_for(path)
    (path := tmp_path / "9.gguf").write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uh.weight"))
    with pytest.raises(
        CheckpointError, match=r"misses model\.layers\.1\.mlp\.up_proj\.weight and has unknown blk"
    ):
        load(stand_for(path))


def test_the_config_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    write("mixtral", tmp_path / "original")
    write_gguf(tmp_path / "original", tmp_path / "a.gguf")
    config = json.loads((stand_for(tmp_path / "a.gguf") / "config.json").read_text())
    expected = {"model_type": "mixtral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 4}
    assert {key: config[key] for key in expected} == expected
