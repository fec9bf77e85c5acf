"""Checkpoints that are changed after they were written: other layouts of the same weights, and mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import load_runner
from toptwo.errors import CheckpointError
from toptwo.models.registry import read_config

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]

EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)\.weight")


def rewrite(directory: Path, change: Change) -> None:
    """Apply `change` to the tensors of a single-file checkpoint."""
    path = directory / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_tensors_refused(directory: Path, change: Change, words: str) -> None:
    """The checkpoint cannot be loaded after the change, and the error says so in these words (a pattern)."""
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=words):
        load_runner(directory)


def assert_config_refused(directory: Path, changes: dict[str, Any], words: str) -> None:
    """The same for config.json."""
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_config(directory)
    assert "config.json" in str(caught.value)


def without(name: str) -> Change:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def replaced(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: {**tensors, name: tensor}


def stack_experts(tensors: Tensors) -> Tensors:
    """From a tensor per expert to one per projection, [E, O, I], as GGUF files have them."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if found := EXPERT.fullmatch(name):
            stack = stacks.setdefault(f"{found['stack']}.{found['projection']}.weight", {})
            stack[int(found["expert"])] = tensor
        else:
            rest[name] = tensor
    assert stacks
    return rest | {name: torch.stack([stack[e] for e in sorted(stack)]) for name, stack in stacks.items()}


def fuse_experts(tensors: Tensors) -> Tensors:
    """From a tensor per expert to gates on ups [E, 2F, H] and downs [E, H, F], as transformers 5 has them."""
    stacked = stack_experts(tensors)
    for name in [name for name in stacked if name.endswith(".experts.gate_proj.weight")]:
        stack = name.removesuffix(".gate_proj.weight")
        gate, up, down = (stacked.pop(f"{stack}.{each}_proj.weight") for each in ("gate", "up", "down"))
        stacked[f"{stack}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        stacked[f"{stack}.down_proj"] = down
    return stacked
