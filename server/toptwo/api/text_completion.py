"""The JSON of a text completion: the text_completion object, whole or as the chunks of a stream.

Knows OpenAI's response format; must not know HTTP or where the text comes from.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import orjson

from toptwo.api.completion import ChoiceText, CompletionHead, usage_fields
from toptwo.api.generation import Delta, Usage, add_up
from toptwo.api.text_completion_schema import CompletionRequest
from toptwo.api.token_text import LEAST_LOGPROB, Likelihood, TokenReport
from toptwo.text.parsers import Content
from toptwo.text.tokenizer import Tokenizer

KIND = "text_completion"


@dataclass(frozen=True)
class Echo:
    """A prompt as its answer repeats it. first: its first token, on which there is no report."""

    text: str
    first: Likelihood


@dataclass(frozen=True)
class CompletionForm:
    """What an answer shows.

    num_choices: answers to each prompt, which lie side by side among all choices.
    echoes: one per prompt, or none. logprobs: whether tokens are reported on.
    has_output: whether generated text is shown at all. hidden: texts of tokens that readers do not see.
    """

    num_choices: int
    echoes: tuple[Echo, ...] = ()
    logprobs: bool = False
    has_output: bool = True
    hidden: frozenset[str] = frozenset()


def form_of(
    request: CompletionRequest, prompt_ids: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> CompletionForm:
    """The form that the request asks for. prompt_ids: the tokens of each prompt."""
    echoes = [
        Echo(
            prompt if isinstance(prompt, str) else tokenizer.decode(ids),
            Likelihood(tokenizer.decode(ids[:1]), 0.0, tokenizer.token_bytes(ids[0])),
        )
        for prompt, ids in zip(request.prompts, prompt_ids, strict=True)
        if request.echo
    ]
    return CompletionForm(
        num_choices=request.num_choices,
        echoes=tuple(echoes),
        logprobs=request.logprobs is not None,
        has_output=request.max_tokens != 0,
        hidden=frozenset(tokenizer.special_tokens),
    )


def text_completion(
    head: CompletionHead, choices: Sequence[ChoiceText], form: CompletionForm, num_candidates: int
) -> bytes:
    """The answer. choices: `num_candidates` of each prompt, of which the likeliest are shown."""
    groups = [choices[at : at + num_candidates] for at in range(0, len(choices), num_candidates)]
    usage = _usage([[one.usage for one in group if one.usage] for group in groups], form)
    shown = [one for group in groups for one in _likeliest(group, form.num_choices)]
    parts = [
        _ChoiceWriter(index, form).part(
            Delta(
                index,
                (Content(choice.text),),
                tuple(choice.reports),
                tuple(choice.prompt_reports),
                choice.finish_reason,
            )
        )
        for index, choice in enumerate(shown)
    ]
    return orjson.dumps({**head.fields(KIND), "choices": parts, "usage": usage_fields(usage)})


class TextChunkWriter:
    """Writes the chunks of a stream, one per delta. num_choices: of all prompts together.

    With include_usage every chunk has the field `usage`, and a last one nothing but the counts.
    """

    def __init__(
        self, head: CompletionHead, form: CompletionForm, *, num_choices: int, include_usage: bool
    ) -> None:
        self._fields = head.fields(KIND)
        self._form = form
        self._writers = [_ChoiceWriter(index, form) for index in range(num_choices)]
        self._usages: dict[int, Usage] = {}
        self._no_usage = {"usage": None} if include_usage else {}

    def opening(self) -> Iterator[bytes]:
        """Nothing: a choice needs no introduction."""
        yield from ()

    def chunks(self, delta: Delta) -> Iterator[bytes]:
        """The chunk of a delta; behind the last choice's last one, that of the counts if wanted."""
        part = self._writers[delta.index].part(delta)
        yield orjson.dumps({**self._fields, "choices": [part], **self._no_usage})
        if delta.usage is not None:
            self._usages[delta.index] = delta.usage
            if self._no_usage and len(self._usages) == len(self._writers):
                usages = [self._usages[index] for index in range(len(self._writers))]
                size = self._form.num_choices
                groups = [usages[at : at + size] for at in range(0, len(usages), size)]
                counts = usage_fields(_usage(groups, self._form))
                yield orjson.dumps({**self._fields, "choices": [], "usage": counts})


class _ChoiceWriter:
    """Writes one choice, whole or in parts; the prompt that it repeats comes with the first part."""

    def __init__(self, index: int, form: CompletionForm) -> None:
        self._index = index
        self._form = form
        self._echo = form.echoes[index // form.num_choices] if form.echoes else None
        self._offsets = _Offsets(len(self._echo.text) if self._echo else 0, form.hidden)

    def part(self, delta: Delta) -> dict[str, object]:
        echo, self._echo = self._echo, None
        text = "".join(piece.text for piece in delta.pieces if isinstance(piece, Content))
        rows: list[_Row] = []
        if echo is not None and self._form.logprobs:
            offsets = _PromptOffsets(echo.text)
            rows.append(_Row(_shown(echo.first), None, None, offsets.step(echo.first)))
            rows += [_row(report, offsets.step(report.token)) for report in delta.prompt_reports]
        reason = delta.finish_reason
        if not self._form.has_output:
            text, reason = "", "length" if reason else None
        elif self._form.logprobs:
            rows += [_row(report, self._offsets.step(report.token)) for report in delta.reports]
        return {
            "index": self._index,
            "text": text if echo is None else echo.text + text,
            "logprobs": _columns(rows) if self._form.logprobs else None,
            "finish_reason": reason,
        }


@dataclass(frozen=True)
class _Row:
    """What is reported on one token; None where the model had nothing to judge it by."""

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


def _row(report: TokenReport, offset: int) -> _Row:
    token = _shown(report.token)
    top: dict[str, float] = {}
    for one in (*report.top, report.token):  # the token itself is always among them
        top.setdefault(_shown(one), one.logprob)
    return _Row(token, report.token.logprob, top, offset)


def _columns(rows: Sequence[_Row]) -> dict[str, object]:
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        "top_logprobs": [row.top for row in rows],
        "text_offset": [row.offset for row in rows],
    }


def _shown(token: Likelihood) -> str:
    """The token's text. Parts of a character all look alike as text, so they are shown as bytes."""
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


class _Offsets:
    """Where generated tokens begin, in characters. A hidden token takes no room."""

    def __init__(self, start: int, hidden: frozenset[str]) -> None:
        self._at = start
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: Likelihood) -> int:
        """The offset of the next token."""
        here = self._at
        if token.text not in self._hidden:
            self._at += len(self._decoder.decode(token.data))
        return here


class _PromptOffsets:
    """Where a prompt's tokens begin in its text, in characters. Some are not in it: a token that the
    tokenizer adds before it, or the space that it does."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: Likelihood) -> int:
        """The offset of the next token."""
        here = self._at
        piece = self._decoder.decode(token.data)
        for candidate in (piece, piece.removeprefix(" ")):
            if self._text.startswith(candidate, here):
                self._at += len(candidate)
                break
        return here


def _likeliest(group: Sequence[ChoiceText], num_choices: int) -> Sequence[ChoiceText]:
    if len(group) == num_choices:
        return group
    return sorted(group, key=_mean_logprob, reverse=True)[:num_choices]


def _mean_logprob(choice: ChoiceText) -> float:
    logprobs = [report.token.logprob for report in choice.reports]
    return sum(logprobs) / len(logprobs) if logprobs else LEAST_LOGPROB


def _usage(groups: Sequence[Sequence[Usage]], form: CompletionForm) -> Usage:
    """The counts of all prompts; tokens that nobody sees because none were wanted do not count."""
    sums = [add_up(list(group)) for group in groups]
    total = Usage(
        sum(one.prompt_tokens for one in sums),
        sum(one.completion_tokens for one in sums),
        sum(one.cached_tokens for one in sums),
    )
    return total if form.has_output else replace(total, completion_tokens=0)
