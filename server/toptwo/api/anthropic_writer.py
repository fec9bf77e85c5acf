"""The JSON of a message in Anthropic's format: the message object, and the events of its streamed form.

Knows the format; must not know HTTP or where the text comes from.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import orjson

from toptwo.api.answer_blocks import Block, BlockReader, Step
from toptwo.api.completion import CompletionHead
from toptwo.api.generation import Delta, Usage
from toptwo.api.named_events import named_event
from toptwo.errors import ApiError

Json = dict[str, object]

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> Json:
    """Anthropic's envelope; their errors name no field but in the sentence."""
    kind = _KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessageWriter:
    """Writes one message, as events or, when it has seen all deltas, whole.

    num_prompt_tokens: which a stream tells at once. with_thoughts: whether the caller wants them.
    """

    def __init__(self, head: CompletionHead, num_prompt_tokens: int, *, with_thoughts: bool) -> None:
        self._head = head
        self._reader = BlockReader(with_thoughts=with_thoughts)
        self._call_ids: dict[int, str] = {}
        self._usage = Usage(num_prompt_tokens, 0, 0)
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def opening(self) -> Iterator[bytes]:
        """The event before any text."""
        yield named_event({"type": "message_start", "message": self.message()})

    def events(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta; the last delta's end the message."""
        for step in self._reader.steps(delta):
            yield named_event(self._step(step))
        if delta.finish_reason is not None:
            self._stop_sequence = delta.stop
            self._stop_reason = "stop_sequence" if delta.stop else _STOP_REASONS[delta.finish_reason]
            self._usage = delta.usage or self._usage
            end = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
            yield named_event({"type": "message_delta", "delta": end, "usage": _usage_fields(self._usage)})
            yield named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> Iterator[bytes]:
        """The event that ends a message that failed."""
        yield named_event(error_body(error))

    def message(self) -> Json:
        """The message as far as it has come."""
        return {
            "id": self._head.completion_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": [self._whole(block) for block in self._reader.blocks],
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": _usage_fields(self._usage),
        }

    def _step(self, step: Step) -> Json:
        block, here = step.block, {"index": step.block.index}
        match step.kind:
            case "open":
                if block.kind == "call":
                    self._call_ids[block.index] = f"toolu_{uuid.uuid4().hex[:24]}"
                return {"type": "content_block_start", **here, "content_block": self._written(block, "", {})}
            case "grow":
                return {"type": "content_block_delta", **here, "delta": _delta(block, step.text)}
            case "close":
                return {"type": "content_block_stop", **here}

    def _whole(self, block: Block) -> Json:
        return self._written(block, block.text, _input(block) if block.kind == "call" else {})

    def _written(self, block: Block, text: str, arguments: object) -> Json:
        match block.kind:
            case "text":
                return {"type": "text", "text": text}
            case "thought":
                return {"type": "thinking", "thinking": text, "signature": ""}
            case "call":
                call_id = self._call_ids[block.index]
                return {"type": "tool_use", "id": call_id, "name": block.name, "input": arguments}


def _delta(block: Block, text: str) -> Json:
    match block.kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "thought":
            return {"type": "thinking_delta", "thinking": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _input(block: Block) -> object:
    """The call's arguments. Those of an answer that was cut short are no JSON; nothing is made of them."""
    try:
        return orjson.loads(block.text)
    except orjson.JSONDecodeError:
        return {}


def _usage_fields(usage: Usage) -> Json:
    """Tokens read from the cache are counted apart from the others of the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
