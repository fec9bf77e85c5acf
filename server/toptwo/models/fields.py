"""Reading config.json through an allow-list: only the keys an architecture asks for are looked at.

Nothing in a config can name code to run. Every error is one line that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from toptwo.errors import CheckpointError


class ConfigFields:
    """Typed, bounded look-ups in a parsed config.json."""

    def __init__(self, raw: Mapping[str, object], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self._raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, not {_show(value)}")
        if not low <= value <= high:
            raise self.error(key, f"must be between {low} and {high}, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {_show(value)}")
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"must be positive and finite, not {value}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_show(value)}")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        value = self._raw.get(key)
        if not isinstance(value, Sequence) or len(value) != count:
            raise self.error(key, f"must be a list of {count} numbers")
        entries = ConfigFields({f"{key}[{i}]": each for i, each in enumerate(value)}, self._where)
        return tuple(entries.number(f"{key}[{i}]") for i in range(count))

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, none of them negative; empty when absent."""
        value = self._raw.get(key)
        value = () if value is None else value
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.error(key, f"must be a list of integers, not {_show(value)}")
        entries = ConfigFields({f"{key}[{i}]": each for i, each in enumerate(value)}, self._where)
        return tuple(entries.integer(f"{key}[{i}]", low=0) for i in range(len(value)))

    def choices(self, key: str, count: int, *allowed: str) -> tuple[str, ...]:
        """A list of `count` texts out of the allowed ones."""
        value = self._raw.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
            raise self.error(key, f"must be a list of {count} texts")
        entries = ConfigFields({f"{key}[{i}]": each for i, each in enumerate(value)}, self._where)
        for i in range(count):
            entries.require(f"{key}[{i}]", *allowed)
        return tuple(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._raw.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, f"must be a text, not {_show(value)}")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuse a value that this code does not implement; an absent key passes."""
        if key in self._raw and self._raw[key] not in allowed:
            choices = " or ".join(_show(value) for value in allowed)
            raise self.error(key, f"{_show(self._raw[key])} is not supported, only {choices}")

    def section(self, key: str) -> ConfigFields:
        """A nested object; empty when absent."""
        value = self._raw.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "must be an object")
        return ConfigFields(value, f"{self._where}: {key}")

    def sections(self, key: str) -> tuple[ConfigFields, ...]:
        """The objects that a nested object consists of."""
        section = self.section(key)
        return tuple(section.section(name) for name in section._raw)

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {key} {problem}")


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = f"{value!r}"
    return text if len(text) <= 40 else text[:37] + "..."
