"""Architectures by model_type. The file name is the model_type; nothing outside the list is imported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from toptwo.errors import StartupError
from toptwo.models.checkpoint import CausalLM, ModelConfig, Weights, WeightSpec
from toptwo_kernels.ops import Ops

ARCHITECTURES = ("mixtral",)
MAX_CONFIG_BYTES = 1 << 20


class Architecture(Protocol):
    """What an architecture module offers."""

    def read_config(self, raw: Mapping[str, object]) -> ModelConfig:
        """The model's shape from a parsed config.json. Raises StartupError that names the key."""

    def weight_map(self, config: ModelConfig) -> Sequence[WeightSpec]:
        """Every weight of the model and where a checkpoint keeps it."""

    def ignored_tensors(self, config: ModelConfig) -> Sequence[str]:
        """Names a checkpoint may hold that the model does not need."""

    def build(self, config: ModelConfig, weights: Weights, max_len: int, ops: Ops) -> CausalLM:
        """The model over loaded weights, for sequences up to `max_len` tokens."""


def read_config(directory: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture of a checkpoint directory and its config. Raises StartupError."""
    path = directory / "config.json"
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise StartupError(f"{path}: not found; a model directory holds config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StartupError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise StartupError(f"{path}: must be a JSON object")
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise StartupError(f"{path}: model_type {model_type!r} is not supported; there is: {supported}")
    if raw.get("quantization_config") is not None:
        raise StartupError(f"{path}: quantization_config: quantised checkpoints are not supported yet")
    architecture = cast(Architecture, importlib.import_module(f"toptwo.models.{model_type}"))
    return architecture, architecture.read_config(raw)
