"""Typed look-ups in a GGUF file's metadata. Every error is one line that names the file and the key.

Knows values and their types; must not know keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toptwo.errors import CheckpointError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class Metadata:
    """A file's values by key; of keys that begin with `prefix`, the rest is asked for.

    All look-ups raise CheckpointError where the key is missing, without a default, or of another type.
    """

    path: Path
    values: Mapping[str, Value]
    prefix: str = ""

    def below(self, stem: str) -> Metadata:
        """The keys that begin with `stem` and a dot."""
        return Metadata(self.path, self.values, f"{self.prefix}{stem}.")

    def has(self, key: str) -> bool:
        return self.prefix + key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a text, not {show(value)}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, not {show(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {show(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {show(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list) or not isinstance(next(iter(value), ""), str):
            raise self.error(key, f"must be a list of texts, not {show(value)}")
        return [str(each) for each in value]

    def numbers(self, key: str) -> list[float]:
        value = self._value(key, None)
        if not isinstance(value, list) or not isinstance(next(iter(value), 0), int | float):
            raise self.error(key, f"must be a list of numbers, not {show(value)}")
        return [float(each) for each in value]

    def integers(self, key: str) -> list[int]:
        value = self._value(key, None)
        if not isinstance(value, list) or not isinstance(next(iter(value), 0), int):
            raise self.error(key, f"must be a list of integers, not {show(value)}")
        return [int(each) for each in value]

    def error(self, key: str, problem: str) -> CheckpointError:
        """What is wrong with the value of a key."""
        return CheckpointError(f"{self.path}: {self.prefix}{key} {problem}")

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.values.get(self.prefix + key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value


def show(value: object) -> str:
    """What a value is, short enough for a line."""
    text = f"a list of {len(value)}" if isinstance(value, list) else f"{value!r}"
    return text if len(text) <= 60 else text[:57] + "..."
