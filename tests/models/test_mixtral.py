"""Mixtral against transformers, and its config and weight reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tampering import assert_config_refused, assert_tensors_refused, rewrite, without
from tiny import forward_all, write_mixtral
from toptwo.errors import StartupError
from toptwo.models import mixtral
from toptwo.models.registry import read_config
from toptwo_kernels.registry import BACKENDS

PROMPT = torch.randint(0, 320, (1, 70), generator=torch.Generator().manual_seed(1))

SHAPES: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "top-1": {"num_experts_per_tok": 1},
    "top-3 of 5, an odd number of experts": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "all experts": {"num_experts_per_tok": 4},
    "multi-head, wide heads": {"num_key_value_heads": 8, "head_dim": 16},
    "multi-query": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "another theta": {"rope_theta": 1e6},
    "a window that the prompt outgrows": {"sliding_window": 24},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_agree_with_transformers(tmp_path: Path, backend: str, overrides: dict[str, Any]) -> None:
    reference = write_mixtral(tmp_path, **overrides)
    with torch.inference_mode():
        expected = reference(PROMPT).logits[0]
    got = forward_all(tmp_path, PROMPT[0].tolist(), backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_head_dimension_that_vectors_do_not_divide_is_the_references(tmp_path: Path) -> None:
    reference = write_mixtral(tmp_path, head_dim=12)
    with torch.inference_mode():
        expected = reference(PROMPT).logits[0]
    torch.testing.assert_close(forward_all(tmp_path, PROMPT[0].tolist()), expected, atol=1e-4, rtol=0)
    with pytest.raises(StartupError, match=r"--backend cpu: .* head dimension of 12"):
        forward_all(tmp_path, [1], backend="cpu")


def bits(directory: Path) -> torch.Tensor:
    """Logits that agree bit by bit when the weights do: only the native backend promises that."""
    return forward_all(directory, PROMPT[0].tolist(), backend="cpu")


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stacked 3-D layout that transformers 5 uses in memory."""
    fused = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(3):
        source = f"model.layers.{layer}.block_sparse_moe.experts"
        experts = [{w: tensors[f"{source}.{e}.{w}.weight"] for w in ("w1", "w2", "w3")} for e in range(4)]
        target = f"model.layers.{layer}.mlp.experts"
        fused[f"{target}.gate_up_proj"] = torch.stack([torch.cat((e["w1"], e["w3"])) for e in experts])
        fused[f"{target}.down_proj"] = torch.stack([e["w2"] for e in experts])
    return fused


def test_fused_and_per_expert_tensors_load_alike(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    per_expert = bits(tmp_path)
    rewrite(tmp_path, fuse)
    assert torch.equal(bits(tmp_path), per_expert)


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    model = write_mixtral(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole = bits(tmp_path / "whole")
    assert torch.equal(bits(tmp_path / "shards"), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_load_as_float32(tmp_path: Path, backend: str, dtype: str) -> None:
    reference = type(write_mixtral(tmp_path))
    rewrite(tmp_path, lambda tensors: {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()})
    with torch.inference_mode():
        expected = reference.from_pretrained(tmp_path, dtype=torch.float32)(PROMPT).logits[0]
    got = forward_all(tmp_path, PROMPT[0].tolist(), backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computing_in_half_precision_stays_close(tmp_path: Path, backend: str, dtype: str) -> None:
    reference = write_mixtral(tmp_path, initializer_range=0.05)
    with torch.inference_mode():
        expected = reference(PROMPT).logits[0]
    got = forward_all(tmp_path, PROMPT[0].tolist(), dtype=dtype, backend=backend)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max() + 0.02


GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w3.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(GATE), f"misses {GATE}"),
        (without(EXPERT), f"misses {EXPERT}"),
        (
            lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
            "unknown model.layers.0.self",
        ),
        (lambda t: {**t, GATE: t[GATE].T}, r"gate.weight has shape \[64, 4\], expected \[4, 64\]"),
        (lambda t: {**t, "model.norm.weight": torch.ones(64, dtype=torch.int8)}, "model.norm.weight is I8"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: Any, words: str) -> None:
    write_mixtral(tmp_path)
    assert_tensors_refused(tmp_path, change, words)


def test_a_head_written_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    write_mixtral(tmp_path, tie_word_embeddings=True)
    expected = bits(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert torch.equal(bits(tmp_path), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": "../evil"}, "is not supported"),
        ({"model_type": None}, "is not supported"),
        ({"hidden_size": None}, "hidden_size must be an integer"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": -1}, "hidden_size must be between"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be between 1 and 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"sliding_window": 0}, "sliding_window must be between"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, "type 'ntk' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_mixtral(tmp_path)
    assert_config_refused(tmp_path, changes, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StartupError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not found"):
        read_config(tmp_path)


def test_configs_of_transformers_4_and_5_read_alike() -> None:
    shape = {
        "vocab_size": 32002,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    }
    old = mixtral.read_config({**shape, "rope_theta": 1e6, "torch_dtype": "bfloat16"})
    new = mixtral.read_config(
        {**shape, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    )
    assert old == new
    assert (old.heads.head_dim, old.num_experts, old.experts_per_token) == (128, 8, 2)
