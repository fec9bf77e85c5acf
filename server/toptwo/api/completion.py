"""The JSON of an answer: the chat.completion object and the chunks of its streamed form.

Knows OpenAI's response format and its traps (the role is sent once, every chunk has the same head, the
usage chunk is the last one); must not know HTTP or where the text comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from toptwo import __version__
from toptwo.api.generation import Delta, Usage
from toptwo.messages import EngineInfo


@dataclass(frozen=True)
class CompletionHead:
    """What all parts of one answer have in common.

    created: seconds since 1970. fingerprint: changes when the same seed may give other tokens.
    """

    completion_id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, object]:
        """The leading fields of an object of the kind, say "chat.completion"."""
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def fingerprint(model: str, info: EngineInfo) -> str:
    """A short name of everything but the request that decides which tokens a seed gives."""
    parts = (__version__, model, info.architecture, info.device, info.dtype, info.quantization, info.backend)
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def completion(head: CompletionHead, text: str, last: Delta) -> bytes:
    """The whole answer; `last` is its final delta."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": last.finish_reason,
    }
    body = head.fields("chat.completion") | {"choices": [choice], "usage": _usage(last.usage)}
    return orjson.dumps(body)


class ChunkWriter:
    """Writes the chunks of one answer. With include_usage every chunk has the field `usage`."""

    def __init__(self, head: CompletionHead, *, include_usage: bool) -> None:
        self._head = head.fields("chat.completion.chunk")
        self._tail: Mapping[str, object] = {"usage": None} if include_usage else {}

    def opening(self) -> bytes:
        """The first chunk, the only one with a role."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def text(self, text: str) -> bytes:
        """A piece of the answer."""
        return self._chunk({"content": text})

    def closing(self, finish_reason: str) -> bytes:
        """The last chunk of the choice."""
        return self._chunk({}, finish_reason)

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream with include_usage; none may follow, or clients lose the counts."""
        return orjson.dumps(self._head | {"choices": [], "usage": _usage(usage)})

    def _chunk(self, delta: Mapping[str, object], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return orjson.dumps({**self._head, "choices": [choice], **self._tail})


def _usage(usage: Usage | None) -> dict[str, object] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
