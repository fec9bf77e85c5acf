"""Weights that are stored as several tensors each, and the checkpoint that shows them decoded.

Knows how a format's module describes such weights and looks at what is stored; must not know any format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from toptwo.errors import CheckpointError
from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.safetensors_files import SafetensorsFiles

SCALES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Encoded:
    """A weight of `shape` that `decode` makes of stored tensors.

    parts: their names, by decode's keywords. decode: may raise ValueError for numbers that mean nothing.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]


@dataclass(frozen=True)
class Encodings:
    """The quantised weights of a checkpoint by name, and stored tensors that decoding has no use for."""

    weights: Mapping[str, Encoded]
    unused: Set[str] = field(default_factory=frozenset)


FindEncodings = Callable[[SafetensorsFiles, ConfigFields], Encodings]
"""What a format's module offers, given the checkpoint's `quantization_config`. Reads headers alone; raises
CheckpointError for what is not supported, lacks or does not fit together."""


class DecodedCheckpoint:
    """The `Checkpoint` of a quantised model. A weight is decoded when it is asked for and not kept."""

    def __init__(self, files: SafetensorsFiles, encodings: Encodings) -> None:
        self._files = files
        self._weights = encodings.weights
        self.directory = files.directory
        # How numbers are decoded stands in the config.
        self.paths = [*files.paths, files.directory / "config.json"]
        parts = {part for weight in self._weights.values() for part in weight.parts.values()}
        plain = files.names - parts - encodings.unused
        for name in sorted(plain & self._weights.keys()):
            raise files.error(name, f"is also there as {', '.join(self._weights[name].parts.values())}")
        self.names: Set[str] = plain | self._weights.keys()

    def __enter__(self) -> DecodedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights.get(name)
        return weight.shape if weight else self._files.shape(name)

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.get(name)
        if weight is None:
            return self._files.tensor(name)
        try:
            return weight.decode(**{key: self._files.raw(part) for key, part in weight.parts.items()})
        except ValueError as error:
            raise CheckpointError(f"{self.directory}: {name} cannot be decoded: {error}") from None

    def release(self, name: str) -> None:
        weight = self._weights.get(name)
        for part in weight.parts.values() if weight else (name,):
            self._files.release(part)


def stems(files: SafetensorsFiles, suffix: str) -> Iterator[str]:
    """Names that end in `suffix`, without it."""
    return (name.removesuffix(suffix) for name in sorted(files.names) if name.endswith(suffix))


def named(files: SafetensorsFiles, *ends: str) -> set[str]:
    """Stored tensors whose name after the last dot is one of `ends`."""
    return {name for name in files.names if name.rpartition(".")[2] in ends}


def part(
    files: SafetensorsFiles, name: str, dtypes: Sequence[str], shape: Sequence[int | None]
) -> tuple[int, ...]:
    """The shape of a stored tensor that has to be there, of one of `dtypes` and of `shape`; None is any size.

    Raises CheckpointError that names it.
    """
    if name not in files.names:
        raise CheckpointError(f"{files.directory}: the checkpoint misses {name}")
    stored = files.stored(name)
    if stored.dtype not in dtypes:
        raise files.error(name, f"is {stored.dtype}, expected {' or '.join(dtypes)}")
    fits = len(stored.shape) == len(shape) and all(
        found > 0 and wanted in (None, found) for found, wanted in zip(stored.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise files.error(name, f"has shape {list(stored.shape)}, expected [{expected}]")
    return stored.shape
