"""Architectures by model_type. The file name is the model_type; nothing outside the list is imported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from toptwo.errors import CheckpointError
from toptwo.models.checkpoint import CausalLM, ModelConfig, Weights, WeightSpec
from toptwo_kernels.ops import Ops

ARCHITECTURES = (
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "grok1",
    "llama",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
# Other names of an architecture: model_types, and classes where the model_type is that of another one.
ALIASES = {
    "grok": "grok1",
    "grok-1": "grok1",
    "Grok1ForCausalLM": "grok1",
    "Grok1ModelForCausalLM": "grok1",
}
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20


class Architecture(Protocol):
    """What an architecture module offers."""

    def read_config(self, raw: Mapping[str, object]) -> ModelConfig:
        """The model's shape from a parsed config.json. Raises CheckpointError that names the key."""

    def weight_map(self, config: ModelConfig) -> Sequence[WeightSpec]:
        """Every weight of the model and where a checkpoint keeps it."""

    def ignored_tensors(self, config: ModelConfig) -> Sequence[str]:
        """Names a checkpoint may hold that the model does not need."""

    def build(self, config: ModelConfig, weights: Weights, max_len: int, ops: Ops) -> CausalLM:
        """The model over loaded weights, for sequences up to `max_len` tokens."""


def read_config(directory: Path) -> tuple[Architecture, ModelConfig]:
    """The architecture of a checkpoint directory and its config. Raises CheckpointError."""
    return parse_config(read_json(directory), directory / CONFIG)


def parse_config(raw: Mapping[str, object], where: Path) -> tuple[Architecture, ModelConfig]:
    """The same for a config that was read already; `where` it is from, for messages."""
    model_type = _name_of(raw)
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{where}: model_type {model_type!r} is not supported; there is: {supported}")
    architecture = cast(Architecture, importlib.import_module(f"toptwo.models.{model_type}"))
    return architecture, architecture.read_config(raw)


def read_json(directory: Path) -> Mapping[str, object]:
    """A checkpoint's config.json as it stands. Raises CheckpointError."""
    path = directory / CONFIG
    try:
        with path.open("rb") as file:
            raw = json.loads(file.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a model directory holds {CONFIG}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return raw


def _name_of(raw: Mapping[str, object]) -> object:
    """The architecture that a config is of, by our name where others call it otherwise."""
    classes, model_type = raw.get("architectures"), raw.get("model_type")
    names = [*(classes if isinstance(classes, list) else []), model_type]
    return next((ALIASES[name] for name in names if isinstance(name, str) and name in ALIASES), model_type)
