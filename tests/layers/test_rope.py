"""Rotary tables as a config.json asks for them, against transformers' own frequencies."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from toptwo.errors import StartupError
from toptwo.layers.rope import LinearScaling, LongRopeScaling, RopeConfig
from toptwo.models.fields import ConfigFields
from toptwo.models.rope import read_rope
from toptwo_kernels.ops import Rope

DIM = 64
SHAPE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
SHORT, LONG = [1.0 + i / 40 for i in range(32)], [2.0 + i / 2 for i in range(32)]


def read(**entries: Any) -> RopeConfig:
    return read_rope(ConfigFields({**SHAPE, **entries}), 10_000.0, DIM)


def turned(tables: Rope) -> tuple[Tensor, Tensor]:
    """The frequencies [D/2] that tables were made of, and the factor on each, seen from position 1."""
    cos, sin = tables.cos_LD[1], tables.sin_LD[1]
    return torch.atan2(sin, cos), torch.hypot(sin, cos)


def assert_agrees(entries: dict[str, Any], length: int) -> None:
    """With what transformers makes of the same config for a context of so many tokens."""
    got, factors = turned(read(**entries).tables(length, DIM))
    initialise = ROPE_INIT_FUNCTIONS[entries["rope_parameters"]["rope_type"]]
    config = LlamaConfig(**SHAPE, **deepcopy(entries))  # it writes into what it is given
    expected, magnitude = initialise(config, seq_len=length)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(factors, torch.full((DIM // 2,), magnitude), rtol=1e-5, atol=0)


def test_plain_tables_are_transformers() -> None:
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    )
    positions = torch.arange(3000)
    cos, sin = rotary(torch.zeros(1), positions[None])
    tables = read(rope_theta=5e5).tables(3000, DIM)
    torch.testing.assert_close(tables.cos_LD, cos[0, :, : DIM // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(tables.sin_LD, sin[0, :, : DIM // 2], rtol=0, atol=1e-6)


def test_every_position_turns_by_its_multiple() -> None:
    tables = read(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 3.0}).tables(5, 4)
    angles = torch.tensor([[p / 3, p / 10 / 3] for p in range(5)])
    torch.testing.assert_close(tables.cos_LD, angles.cos())
    torch.testing.assert_close(tables.sin_LD, angles.sin())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 1024,
}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 1024},
    "llama3, wide blend": {**LLAMA3, "high_freq_factor": 32.0, "original_max_position_embeddings": 512},
    "llama3, original length left out": LLAMA3,
    "yarn": YARN,
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, other turns": {**YARN, "beta_fast": 16, "beta_slow": 2.0},
    "yarn, a ramp of no width": {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False},
    "yarn, a ramp from the first dimension": {**YARN, "original_max_position_embeddings": 48},
    "yarn, a ramp beyond the last dimension": {**YARN, "rope_theta": 5.0, "beta_fast": 128.0},
    "yarn, not longer at all": {**YARN, "factor": 1.0},
    "yarn, factor left out": {**YARN, "factor": None},
    "yarn, original length left out": {"rope_type": "yarn", "factor": 4.0},
    "yarn, attention factor": {**YARN, "attention_factor": 1.3},
    "yarn, both mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn, equal mscales": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn, one mscale, which says nothing": {**YARN, "mscale": 0.707},
    "longrope": LONGROPE,
    "longrope, factor": {**LONGROPE, "factor": 16.0},
    "longrope, not longer at all": {**LONGROPE, "factor": 1.0},
    "longrope, attention factor": {**LONGROPE, "attention_factor": 1.19},
}


@pytest.mark.parametrize("length", [64, 1024, 1025, 4096])
@pytest.mark.parametrize("parameters", SCALINGS.values(), ids=SCALINGS)
def test_scalings_agree_with_transformers(parameters: dict[str, Any], length: int) -> None:
    assert_agrees({"rope_parameters": {"rope_theta": 150_000.0, **parameters}}, length)


@pytest.mark.parametrize("kind", [YARN, LLAMA3, LONGROPE], ids=["yarn", "llama3", "longrope"])
def test_an_original_length_outside_the_parameters_counts(kind: dict[str, Any]) -> None:
    parameters = {"rope_theta": 10_000.0, **kind, "original_max_position_embeddings": 1024}
    assert_agrees({"rope_parameters": parameters, "original_max_position_embeddings": 256}, 512)


def test_longrope_takes_one_set_for_the_longest_context_served() -> None:
    rope = read(rope_parameters={"rope_theta": 100.0, **LONGROPE})
    plain = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
    torch.testing.assert_close(turned(rope.tables(1024, DIM))[0], plain / torch.tensor(SHORT))
    torch.testing.assert_close(turned(rope.tables(1025, DIM))[0], plain / torch.tensor(LONG))


def test_longrope_may_give_its_magnitudes() -> None:
    """As Phi-3.5-MoE does."""
    rope = read(rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2432})
    assert isinstance(rope.scaling, LongRopeScaling)
    for length, magnitude in ((1024, 1.1), (1025, 1.2432)):
        factors = turned(rope.tables(length, DIM))[1]
        torch.testing.assert_close(factors, torch.full((DIM // 2,), magnitude), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [{"rope_type": "linear", "factor": 2.5}, YARN, LLAMA3, LONGROPE])
def test_files_of_transformers_4_and_5_read_alike(kind: dict[str, Any]) -> None:
    new = read(rope_parameters={"rope_theta": 1e6, **kind})
    assert read(rope_theta=1e6, rope_scaling=kind) == new
    older = {"type": kind["rope_type"], **{key: value for key, value in kind.items() if key != "rope_type"}}
    assert read(rope_theta=1e6, rope_scaling=older) == new


def test_su_is_the_old_name_of_longrope() -> None:
    older = {**LONGROPE, "rope_type": "su"}
    assert read(rope_scaling=older) == read(rope_scaling=LONGROPE)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, RopeConfig(10_000.0)),
        ({"rope_scaling": None}, RopeConfig(10_000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(5e5, LinearScaling(2)),
        ),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}}, RopeConfig(5e5)),
        ({"partial_rotary_factor": 1.0}, RopeConfig(10_000.0)),
    ],
)
def test_what_is_left_out_has_a_default(entries: dict[str, Any], expected: RopeConfig) -> None:
    assert read(**entries) == expected


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters: rope_theta must be a number"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"type": "ntk"}}, "rope_scaling: type 'ntk' is not supported, only 'default' or"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number"),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor must be over low_freq_factor",
        ),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast must be positive"),
        ({"rope_scaling": {**YARN, "truncate": "no"}}, "truncate must be true or false"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
            "rope_scaling: original_max_position_embeddings must be between",
        ),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "short_factor must be a list of 32 numbers"),
        ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor must be a list of 32 numbers"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 32}}, r"long_factor\[0\] must be positive"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters: partial_rotary_factor 0.25 is not supported",
        ),
    ],
)
def test_a_wrong_value_is_named(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        read(**entries)
    assert str(caught.value).startswith("config.json: ")
