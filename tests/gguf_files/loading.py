"""Model directories and their weights, as tests compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toptwo.gguf.directory import write_model_directory
from toptwo.gguf.files import parts_of
from toptwo.models.registry import read_config
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.loader import load_weights


def stand_for(file: Path) -> Path:
    """The model directory of a GGUF file, beside it."""
    directory = file.with_suffix(".model")
    if not directory.exists():
        directory.mkdir()
        write_model_directory(parts_of(file), directory)
    return directory


def load(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config, and every weight by the model's name for it."""
    architecture, config = read_config(directory)
    specs, weights = architecture.weight_map(config), {}
    with open_checkpoint(directory, specs) as checkpoint:
        ignored = architecture.ignored_tensors(config)
        load_weights(checkpoint, specs, ignored, lambda s, w: weights.update({s.name: w.clone()}))
    return config, weights


def assert_same_model(one: Path, other: Path) -> None:
    """Equal configs, and weights that are equal bit by bit."""
    (expected_config, expected), (config, weights) = load(one), load(other)
    assert config == expected_config
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name].float(), weight.float()), name
