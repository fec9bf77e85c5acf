"""JSON objects of requests: strict types, no unknown fields, errors that name the field.

Types are strict ("1" and true are no numbers) and null stands for the default. Knows pydantic; must not
know any request in particular.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from toptwo.api.parameters import NOTHING_ELSE, ParameterTable, unsupported


class StrictModel(BaseModel):
    """A JSON object of the request. Fields that it does not serve are judged by its `table`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    table: ClassVar[ParameterTable] = NOTHING_ELSE

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        cls.refuse_kind(given)
        served = {field.alias or name for name, field in cls.model_fields.items()}
        return cls.table.strip(given, served)

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        """Raise PydanticCustomError when the object as a whole is of a kind that is not served."""

    def ignored_inside(self) -> list[str]:
        """Paths of fields that were set inside the object and make no difference."""
        return []

    @property
    def is_stream(self) -> bool:
        """Whether the answer is to come in pieces."""
        return bool(getattr(self, "stream", None))

    @property
    def num_sequences(self) -> int:
        """How many sequences the request as a whole has the engine generate; 1 also where it has none."""
        return 1


def shape_of_list(value: object) -> str:
    """For unions of one and many: the tag of the branch, so that errors speak of one branch only."""
    return "many" if isinstance(value, list) else "one"


def shape_of_object(value: object) -> str:
    """For unions of a word and an object."""
    return "object" if isinstance(value, dict) else "word"


def contradiction(name: str, message: str) -> PydanticCustomError:
    """The error for a field whose value is fine by itself and wrong in this request."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "field": name})


def refuse_kind(name: str, value: object, *, served: tuple[str, ...], later: tuple[str, ...]) -> None:
    """Speak about the kind before anything else: the other fields of an image part are no mistake."""
    if not isinstance(value, str) or value in served:
        return  # a wrong type is the schema's to report
    choices = ", ".join(served)
    if value in later:
        raise unsupported(name, f"'{value}' is not supported; supported: {choices}.")
    raise PydanticCustomError(
        "invalid_value", "{message}", {"message": f"Supported values: {choices}.", "field": name}
    )
