"""Reading config.json through an allow-list: only the keys an architecture asks for are looked at.

Nothing in a config can name code to run. Every error is one line that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from toptwo.errors import StartupError


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

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def error(self, key: str, problem: str) -> StartupError:
        return StartupError(f"{self._where}: {key} {problem}")


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = f"{value!r}"
    return text if len(text) <= 40 else text[:37] + "..."


def rope_theta(fields: ConfigFields, default: float) -> float:
    """Base of the rotary embedding, from `rope_theta` or transformers 5's `rope_parameters`.

    Raises StartupError for any scaled variant, which would need other tables.
    """
    for key in ("rope_parameters", "rope_scaling"):
        section = fields.section(key)
        for type_key in ("rope_type", "type"):
            section.require(type_key, "default")
    parameters = fields.section("rope_parameters")
    return parameters.number("rope_theta", fields.number("rope_theta", default))
