"""Which request fields exist beyond those served, and what is done with each of them.

A field is served (it is a field of a schema), harmless (a hint that is dropped, which the caller is
told), neutral (its value asks for what happens anyway), unsupported, or unknown. Nothing that changes
the meaning of a request is ever dropped in silence.

Knows names and values; must not know HTTP or how a request is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from pydantic_core import PydanticCustomError

LONGEST_NAME = 64  # characters of a caller's field name that an error repeats

Test = Callable[[object], bool]


def anything(value: object) -> bool:
    """Accepts every value."""
    return True


def any_of(*values: object) -> Test:
    """Accepts exactly these values; True is not 1."""
    return lambda value: any(type(value) is type(v) and value == v for v in values)


@dataclass(frozen=True)
class ParameterTable:
    """The fields of one JSON object that its schema does not serve.

    harmless, neutral: name -> whether a value of it can be left out; any other value is refused, but
        null always can.
    """

    harmless: Mapping[str, Test] = field(default_factory=dict)
    neutral: Mapping[str, Test] = field(default_factory=dict)

    def strip(self, given: Mapping[str, object], served: Collection[str]) -> dict[str, object]:
        """The served fields of `given`.

        Raises PydanticCustomError (unsupported_parameter, unknown_parameter) that names the first
        field that cannot be left out.
        """
        kept = {}
        for name, value in given.items():
            if name in served:
                kept[name] = value
                continue
            can_be_left_out = self.harmless.get(name) or self.neutral.get(name)
            if can_be_left_out is None:
                shown = name[:LONGEST_NAME]
                raise PydanticCustomError("unknown_parameter", "There is no such parameter", {"field": shown})
            if value is not None and not can_be_left_out(value):
                raise unsupported(name, "This parameter, or this value of it, is not supported.")
        return kept

    def ignored(self, given: Mapping[str, object]) -> list[str]:
        """Harmless fields of `given` that the caller set, in the caller's order."""
        return [name for name, value in given.items() if name in self.harmless and value is not None]


def unsupported(name: str, message: str) -> PydanticCustomError:
    """The error for a field whose meaning is known and cannot be honoured."""
    return PydanticCustomError("unsupported_parameter", "{message}", {"message": message, "field": name})


CHAT_REQUEST = ParameterTable(
    harmless={
        "metadata": anything,
        "prediction": anything,
        "prompt_cache_key": anything,
        "prompt_cache_options": anything,
        "prompt_cache_retention": anything,
        "safety_identifier": anything,
        "service_tier": any_of("auto", "default"),
        "store": any_of(False),
        "user": anything,
    },
    neutral={
        "audio": any_of(),
        "function_call": any_of("none", "auto"),
        "functions": any_of([]),
        "modalities": any_of(["text"]),
        "moderation": any_of(),
        "verbosity": any_of("medium"),
        "web_search_options": any_of(),
    },
)

# What an answer of ours contains, and callers send back as the assistant's message.
CHAT_MESSAGE = ParameterTable(
    neutral={
        "annotations": any_of([]),
        "audio": any_of(),
        "function_call": any_of(),
        "refusal": any_of(),
    }
)
NOTHING_ELSE = ParameterTable()
