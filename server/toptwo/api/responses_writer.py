"""The JSON of a response: the response object, and the events of its streamed form.

Knows OpenAI's format; must not know HTTP or where the text comes from.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel

from toptwo.api.answer_blocks import Block, BlockReader, Step
from toptwo.api.completion import CompletionHead, new_call_id
from toptwo.api.generation import Delta, Usage
from toptwo.api.named_events import named_event
from toptwo.api.responses_schema import ResponsesRequest
from toptwo.api.token_text import Likelihood, TokenReport
from toptwo.errors import ApiError

Json = dict[str, object]

_PREFIXES = {"text": "msg", "thought": "rs", "call": "fc"}
_DELTAS = {
    "text": "response.output_text",
    "thought": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_STATUSES = {"stop": "completed", "tool_calls": "completed", "length": "incomplete"}


class ResponseWriter:
    """Writes one response, as events or, when it has seen all deltas, whole."""

    def __init__(self, head: CompletionHead, request: ResponsesRequest) -> None:
        self._reader = BlockReader()
        self._ids: list[tuple[str, str]] = []  # of each block, and for a call that of the call
        self._status = "in_progress"
        self._usage: Usage | None = None
        self._error: Json | None = None
        self._fixed = _fixed_fields(head, request)
        self._sequence_number = 0

    def opening(self) -> Iterator[bytes]:
        """The events before any text."""
        yield self._response_event("response.created")
        yield self._response_event("response.in_progress")

    def events(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta; the last delta's end the response."""
        self._usage = delta.usage or self._usage
        ended = _STATUSES.get(delta.finish_reason or "")
        for step in self._reader.steps(delta):
            # The block that the end cut short is the last one; all others are complete.
            status = ended if step.block is self._reader.blocks[-1] and ended else "completed"
            yield from map(self._event, self._step(step, status))
        if ended:
            self._status = ended
            yield self._response_event(f"response.{ended}")

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """The events that end a response that failed."""
        self._status = "failed"
        self._error = {"code": "server_error", "message": error.message}
        yield self._event({"type": "error", "code": error.code, "message": error.message, "param": None})
        yield self._response_event("response.failed")

    def response(self) -> Json:
        """The response as far as it has come."""
        is_incomplete = self._status == "incomplete"
        return {
            **self._fixed,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
            "output": [self._item(block, self._status_of(block)) for block in self._reader.blocks],
            "usage": _usage_fields(self._usage) if self._usage else None,
        }

    def _step(self, step: Step, status: str) -> Iterator[Json]:
        block, at = step.block, {"output_index": step.block.index}
        if step.kind == "open":
            self._ids.append((f"{_PREFIXES[block.kind]}_{uuid.uuid4().hex}", new_call_id()))
            item = self._item(block, "in_progress")
            yield {"type": "response.output_item.added", **at, "item": item}
        here = {"item_id": self._ids[block.index][0], **at}
        if block.kind != "call":
            here["content_index"] = 0
        if step.kind == "open" and block.kind != "call":
            yield {"type": "response.content_part.added", **here, "part": _part(block)}
        if step.kind == "grow":
            yield {"type": f"{_DELTAS[block.kind]}.delta", **here, "delta": step.text} | (
                {"logprobs": _logprobs(step.reports)} if block.kind == "text" else {}
            )
        if step.kind == "close":
            yield from self._closing(block, here)
            yield {"type": "response.output_item.done", **at, "item": self._item(block, status)}

    def _closing(self, block: Block, here: Mapping[str, object]) -> Iterator[Json]:
        kind = f"{_DELTAS[block.kind]}.done"
        if block.kind == "call":
            yield {"type": kind, **here, "name": block.name, "arguments": block.text}
            return
        done: Json = {"type": kind, **here, "text": block.text}
        if block.kind == "text":
            done["logprobs"] = _logprobs(block.reports)
        yield done
        yield {"type": "response.content_part.done", **here, "part": _part(block)}

    def _item(self, block: Block, status: str) -> Json:
        item_id, call_id = self._ids[block.index]
        head: Json = {"id": item_id, "status": status}
        if block.kind == "call":
            call = {"call_id": call_id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **head, **call}
        content = [] if status == "in_progress" and not block.texts else [_part(block)]
        if block.kind == "thought":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def _status_of(self, block: Block) -> str:
        if block is not self._reader.blocks[-1]:
            return "completed"
        return "incomplete" if self._status == "failed" else self._status

    def _response_event(self, kind: str) -> bytes:
        return self._event({"type": kind, "response": self.response()})

    def _event(self, data: Json) -> bytes:
        data["sequence_number"] = self._sequence_number
        self._sequence_number += 1
        return named_event(data)


def _fixed_fields(head: CompletionHead, request: ResponsesRequest) -> Json:
    """What the response repeats of the request, with what its defaults stand for."""
    text = {} if request.text is None or request.text.format is None else _dump(request.text.format)
    effort = None if request.reasoning is None else request.reasoning.effort
    choice = request.tool_choice
    return {
        "id": head.completion_id,
        "object": "response",
        "created_at": head.created,
        "model": head.model,
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": choice if isinstance(choice, str) else _dump(choice) if choice else "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": False, **_dump(tool)}
            for tool in request.tools or []
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": None,
    }


def _dump(model: BaseModel) -> Json:
    return model.model_dump(exclude_none=True, by_alias=True)


def _part(block: Block) -> Json:
    if block.kind == "thought":
        return {"type": "reasoning_text", "text": block.text}
    logprobs = _logprobs(block.reports)
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}


def _logprobs(reports: Sequence[TokenReport]) -> list[Json]:
    return [
        {**_likelihood(report.token), "top_logprobs": [_likelihood(one) for one in report.top]}
        for report in reports
    ]


def _likelihood(one: Likelihood) -> Json:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}


def _usage_fields(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
