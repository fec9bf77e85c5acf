"""The bytes of a request body to a checked request, or to one error that a person understands.

Knows JSON, schemas and OpenAI's error codes; must not know how a request is run. Error messages name
the field and the rule and never repeat the value, which may be megabytes or a secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from toptwo.api.parameters import CHAT_REQUEST
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.errors import ApiError

_LONGEST_MESSAGE = 300
_LONGEST_PARAM = 200
_OWN_CODES = ("unsupported_parameter", "unknown_parameter", "invalid_value")
_OTHER_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


@dataclass(frozen=True)
class ParsedChat:
    """A valid request, and the names of fields it set that make no difference here."""

    request: ChatCompletionRequest
    ignored: tuple[str, ...]


def parse_chat(body: bytes) -> ParsedChat:
    """Decode and check a chat completion request. Raises ApiError (400).

    The JSON parser refuses NaN, numbers beyond a double, unpaired surrogates, bytes that are no UTF-8,
    and nesting beyond 1024 levels; nothing behind it recurses into what it returns.
    """
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            f"The request body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    if not isinstance(given, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_type")
    try:
        request = ChatCompletionRequest.model_validate(given)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise explain(details[0], given) from None
    ignored = CHAT_REQUEST.ignored(given)
    if request.stream_options is not None and request.stream_options.include_obfuscation is not None:
        ignored.append("stream_options.include_obfuscation")
    return ParsedChat(request, tuple(ignored))


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
