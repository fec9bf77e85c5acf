"""Other request formats as chat completion requests, and errors about those in the caller's words.

Knows the shape of chat requests; must not know the formats that are translated, HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import ValidationError

from toptwo.api.chat_job import chat_job
from toptwo.api.job import GenerationJob, JobTicket, Workshop
from toptwo.api.sampling_schema import INT64_MAX
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.validation import explain
from toptwo.errors import ApiError

# The caller's names of a chat request's fields, where they differ. A name covers all that is inside of
# it, since places in a translated list are not places in the caller's.
Names = Mapping[str, str]


def chat_request(given: Mapping[str, object], names: Names) -> ChatCompletionRequest:
    """The chat request out of a translated body; None stands for a field that is not there.

    Raises ApiError (400) that names the caller's field.
    """
    body = {name: value for name, value in given.items() if value is not None}
    try:
        return ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise renamed(explain(details[0], body), names) from None


def renamed(error: ApiError, names: Names) -> ApiError:
    """The error with the caller's name of its field; the longest name that fits wins."""
    param = error.param or ""
    name = _name_of(param, names)
    if name == param:
        return error
    message = error.message.replace(f"'{param}'", f"'{name}'")
    return ApiError(
        message,
        status=error.status,
        kind=error.kind,
        param=name,
        code=error.code,
        headers=error.headers,
    )


def translated_job(
    chat: ChatCompletionRequest, ticket: JobTicket, workshop: Workshop, names: Names
) -> GenerationJob:
    """See chat_job; the caller's field is named in its errors and as the source of a grammar."""
    try:
        job = chat_job(chat, ticket, workshop)
    except ApiError as error:
        raise renamed(error, names) from None
    return replace(job, grammar_param=_name_of(job.grammar_param, names))


def prompt_ids_of(chat: ChatCompletionRequest, workshop: Workshop) -> list[int]:
    """The prompt that the request becomes, however long it is. Slow: call it in a thread.

    Raises ApiError (400) when the template refuses the messages.
    """
    job = chat_job(chat, JobTicket("", ""), replace(workshop, max_model_len=INT64_MAX))
    return job.requests[0].prompt_ids


def _name_of(param: str, names: Names) -> str:
    found = max((name for name in names if _covers(name, param)), key=len, default=None)
    return param if found is None else names[found]


def _covers(name: str, param: str) -> bool:
    return param == name or param.startswith((f"{name}.", f"{name}["))
