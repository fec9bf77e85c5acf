"""What the loader sees of a checkpoint, whichever its format."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor


class Checkpoint(Protocol):
    """A model's tensors by the names that its architecture's `weight_map` uses; close it by `with`."""

    @property
    def directory(self) -> Path:
        """Where it is, for error messages."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files that its numbers come from: when none has changed, no number has."""

    @property
    def names(self) -> Set[str]:
        """Every tensor there is, decoded ones by the name of what they mean."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` returns, from headers alone.

        Raises CheckpointError for a tensor that does not hold floating-point numbers.
        """

    def tensor(self, name: str) -> Tensor:
        """A float32, bfloat16 or float16 tensor: a view of the mapped file where it can be, else decoded."""

    def release(self, name: str) -> None:
        """Give the mapped pages of a tensor back to the system; they are read again if they are used."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
