"""Which format a directory's checkpoint is in, and the `Checkpoint` that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toptwo.gguf.files import linked_parts
from toptwo.models.checkpoint import WeightSpec
from toptwo.models.fields import ConfigFields
from toptwo.models.registry import CONFIG, read_json
from toptwo.runtime.checkpoints import awq, compressed_tensors, fp8, gptq, mxfp4
from toptwo.runtime.checkpoints.encoding import DecodedCheckpoint, FindEncodings
from toptwo.runtime.checkpoints.protocol import Checkpoint
from toptwo.runtime.checkpoints.safetensors_files import INDEX, SINGLE, SafetensorsFiles

METHODS: dict[str, FindEncodings] = {
    "awq": awq.find,
    "compressed-tensors": compressed_tensors.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "mxfp4": mxfp4.find,
}
"""Formats of quantised weights by the `quant_method` of a config's `quantization_config`."""


def open_checkpoint(directory: Path, specs: Sequence[WeightSpec]) -> Checkpoint:
    """The checkpoint of a model directory, to be closed by `with`. specs: the weights that will be asked for.

    Reads headers alone. Raises CheckpointError for what is damaged, refused or not supported.
    """
    parts = linked_parts(directory)
    if parts and not any((directory / name).exists() for name in (SINGLE, INDEX)):
        # Only here: few need it, and its library is slow to load.
        from toptwo.runtime.checkpoints.gguf import GgufCheckpoint

        return GgufCheckpoint(directory, parts, specs)
    files = SafetensorsFiles(directory)
    try:
        config = _read_quantization(directory)
        return DecodedCheckpoint(files, _find(config)(files, config)) if config else files
    except BaseException:
        files.__exit__()
        raise


def _read_quantization(directory: Path) -> ConfigFields | None:
    """What the config says of quantised weights; None where they are not."""
    if not (directory / CONFIG).exists():
        return None  # weights alone; what they are a model of is not asked here
    raw = read_json(directory)
    if raw.get("quantization_config") is None:
        return None
    return ConfigFields(raw, f"{directory / CONFIG}").section("quantization_config")


def _find(config: ConfigFields) -> FindEncodings:
    method = config.text("quant_method")
    if method not in METHODS:
        raise config.error("quant_method", f"{method!r} is not supported; there is {', '.join(METHODS)}")
    return METHODS[method]
