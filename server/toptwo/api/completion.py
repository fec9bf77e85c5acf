"""The JSON of a chat answer: the chat.completion object and the chunks of its streamed form.

Knows OpenAI's response format and its traps (the role is sent once, every chunk has the same head, the
usage chunk is the last one); must not know HTTP or where the text comes from.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from toptwo import __version__
from toptwo.api.generation import Delta, FinishReason, Usage, add_up
from toptwo.api.token_text import Likelihood, TokenReport
from toptwo.messages import EngineInfo
from toptwo.text.parsers import Content, Piece, Reasoning, ToolCallArguments, ToolCallStart


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


def fingerprint(info: EngineInfo) -> str:
    """A short name of everything but the request that decides which tokens a seed gives."""
    parts = (
        __version__,
        info.weights_id,
        info.architecture,
        info.device,
        info.dtype,
        info.kv_dtype,
        info.quantization,
        info.backend,
    )
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def new_call_id() -> str:
    """An id for a tool call, unique for as long as anybody remembers it."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass
class FunctionCall:
    """One call of an answer. arguments: the JSON text of an object."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass
class ChoiceText:
    """One choice of an answer, put together from its deltas."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[FunctionCall] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    prompt_reports: list[TokenReport] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    def add(self, delta: Delta) -> None:
        """Take in the next delta."""
        for piece in delta.pieces:
            match piece:
                case Content(text):
                    self.texts.append(text)
                case Reasoning(text):
                    self.thoughts.append(text)
                case ToolCallStart(_, name):
                    self.calls.append(FunctionCall(new_call_id(), name))
                case ToolCallArguments(index, text):
                    self.calls[index].arguments += text
        self.reports += delta.reports
        self.prompt_reports += delta.prompt_reports
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(self.texts)


def collect(deltas: Sequence[Delta], num_choices: int) -> list[ChoiceText]:
    """The choices of a whole answer, in order."""
    choices = [ChoiceText() for _ in range(num_choices)]
    for delta in deltas:
        choices[delta.index].add(delta)
    return choices


def completion(head: CompletionHead, choices: Sequence[ChoiceText], *, logprobs: bool) -> bytes:
    """The whole answer."""
    usage = add_up([choice.usage for choice in choices if choice.usage])
    body = head.fields("chat.completion") | {
        "choices": [_choice(index, choice, logprobs) for index, choice in enumerate(choices)],
        "usage": usage_fields(usage),
    }
    return orjson.dumps(body)


def usage_fields(usage: Usage) -> dict[str, object]:
    """The counts in OpenAI's form."""
    fields: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        fields["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return fields


class ChunkWriter:
    """Writes the chunks of one answer. With include_usage every chunk has the field `usage`.

    What is the same in every chunk is serialised once.
    """

    def __init__(self, head: CompletionHead, *, num_choices: int, include_usage: bool) -> None:
        self._include_usage = include_usage
        self._usages: dict[int, Usage] = {}  # by choice
        self._num_choices = num_choices
        self._head = orjson.dumps(head.fields("chat.completion.chunk"))[:-1]
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self._content = [self._head + _OPEN % index for index in range(num_choices)]
        self._content_end = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def opening(self) -> Iterator[bytes]:
        """The first chunk of every choice, in order, the only ones with a role."""
        for index in range(self._num_choices):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def chunks(self, delta: Delta) -> Iterator[bytes]:
        """The chunks of a delta; behind the last choice's last one, that of the counts if wanted."""
        reports = delta.reports
        for piece in delta.pieces:
            if isinstance(piece, Content) and not reports:
                yield self._content[delta.index] + orjson.dumps(piece.text) + self._content_end
            else:
                yield self._chunk(delta.index, self._delta_of(piece), reports)
            reports = ()
        if reports:
            yield self._chunk(delta.index, {"content": ""}, reports)
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
        if delta.usage is not None:
            self._usages[delta.index] = delta.usage
            if self._include_usage and len(self._usages) == self._num_choices:
                # None may follow, or clients lose the counts.
                usages = [self._usages[index] for index in range(self._num_choices)]
                usage = orjson.dumps(usage_fields(add_up(usages)))
                yield self._head + b',"choices":[],"usage":' + usage + b"}"

    def _delta_of(self, piece: Piece) -> Mapping[str, object]:
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case ToolCallStart(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": new_call_id(), "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ToolCallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, object],
        reports: Sequence[TokenReport] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(reports) if reports else None,
            "finish_reason": finish_reason,
        }
        return self._head + b',"choices":[' + orjson.dumps(choice) + self._tail


_OPEN = b',"choices":[{"index":%d,"delta":{"content":'


def _choice(index: int, choice: ChoiceText, logprobs: bool) -> dict[str, object]:
    text = choice.text
    message: dict[str, object] = {"role": "assistant", "content": text or None, "refusal": None}
    if not choice.calls:
        message["content"] = text
    if choice.thoughts:
        message["reasoning_content"] = "".join(choice.thoughts)
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in choice.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.reports) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _logprobs(reports: Sequence[TokenReport]) -> dict[str, object]:
    return {"content": [_report(report) for report in reports], "refusal": None}


def _report(report: TokenReport) -> dict[str, object]:
    return {**_likelihood(report.token), "top_logprobs": [_likelihood(one) for one in report.top]}


def _likelihood(one: Likelihood) -> dict[str, object]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.data)}
