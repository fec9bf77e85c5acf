"""The bytes of a request body to a checked request, or to one error that a person understands.

Knows JSON, schemas and OpenAI's error codes; must not know how a request is run. Error messages name
the field and the rule and never repeat the value, which may be megabytes or a secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from toptwo.api.strict import StrictModel
from toptwo.errors import ApiError

_LONGEST_MESSAGE = 300
_LONGEST_PARAM = 200
_OWN_CODES = ("unsupported_parameter", "unknown_parameter", "invalid_value", "missing_required_parameter")
_OTHER_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


MOST_DEPTH = 64  # levels of nesting, far beyond any honest request

Schema = TypeVar("Schema", bound=StrictModel)


@dataclass(frozen=True)
class Parsed(Generic[Schema]):
    """A valid request, and the names of fields it set that make no difference here."""

    request: Schema
    ignored: tuple[str, ...]


def parse_body(body: bytes, schema: type[Schema]) -> Parsed[Schema]:
    """Decode and check a request. Raises ApiError (400).

    The JSON parser refuses NaN, numbers beyond a double, unpaired surrogates and bytes that are no UTF-8.
    """
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            f"The request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(given, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_type")
    if _is_deeper(given, MOST_DEPTH):
        raise ApiError(
            f"The request body is nested more than {MOST_DEPTH} levels deep.", code="invalid_value"
        )
    try:
        request = schema.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise explain(details[0], given) from None
    return Parsed(request, (*schema.table.ignored(given), *request.ignored_inside()))


def _is_deeper(value: object, depth: int) -> bool:
    """Whether objects and lists are nested deeper; level by level, so that nothing recurses."""
    level = [value]
    while level and depth >= 0:
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(v for v in one.values() if isinstance(v, (dict, list)))
            elif isinstance(one, list):
                inner.extend(v for v in one if isinstance(v, (dict, list)))
        level = inner
        depth -= 1
    return bool(level)


def explain(detail: ErrorDetails, given: object) -> ApiError:
    """The ApiError for one of pydantic's errors about the decoded body `given`."""
    path = _path_in(given, detail["loc"], keep_last=detail["type"] == "missing")
    if "field" in detail.get("ctx", {}):
        path.append(detail["ctx"]["field"])
    param = _dotted(path)
    code = _code_of(detail["type"])
    if code == "missing_required_parameter":
        message = f"Missing required parameter: '{param}'"
    elif param:
        message = f"Invalid value for '{param}': {_rule_of(detail)}"
    else:
        message = f"Invalid request: {_rule_of(detail)}"
    return ApiError(message[:_LONGEST_MESSAGE] + ".", param=param, code=code)


def _rule_of(detail: ErrorDetails) -> str:
    # Pydantic speaks of dictionaries and of classes of ours; the caller wrote JSON.
    return "Input should be an object" if detail["type"] == "model_type" else detail["msg"].rstrip(".")


def _code_of(kind: str) -> str:
    if kind in _OWN_CODES:
        return kind
    return _OTHER_CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value")


def _path_in(given: object, location: Sequence[int | str], *, keep_last: bool) -> list[int | str]:
    """The location without the names that pydantic adds for the branches of a union.

    A step is real when it leads somewhere in `given`; a missing field is the last step of its location.
    """
    path: list[int | str] = []
    here = given
    for number, step in enumerate(location, start=1):
        try:
            here = here[step]  # type: ignore[index]
        except (TypeError, LookupError):
            if not keep_last or number < len(location):
                continue
        path.append(step)
    return path


def _dotted(path: Sequence[int | str]) -> str | None:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")[:_LONGEST_PARAM] or None
