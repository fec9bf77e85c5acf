"""Harmony, the format of gpt-oss: what its template is given, and how the model is held to a form.

An answer is a sequence of messages. Each has a header and a body between control tokens:

    <|channel|>analysis<|message|>a thought<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

The prompt ends with "<|start|>assistant". Only <|return|> and <|call|> end an answer; <|end|> ends a message.

Knows control tokens, chat messages and grammars as data; must not know how generated tokens are read
(`harmony_reader` does), HTTP or the engine.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from toptwo.errors import ApiError
from toptwo.text.grammar import GrammarError, framed_grammar, lark_grammar
from toptwo.text.tools import Tool, arguments_schema

START, END, MESSAGE = "<|start|>", "<|end|>", "<|message|>"
CHANNEL, CONSTRAIN = "<|channel|>", "<|constrain|>"
RETURN, CALL = "<|return|>", "<|call|>"
TOKENS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
EFFORTS = ("low", "medium", "high")

# What comes before the message that has a form: a thought, or nothing.
_THOUGHT = """
thought: {channel} "analysis" {message} TEXT {end} {start} "assistant"
TEXT: /(.|\\n)*/"""
_ANSWER = 'start: thought? {channel} "final" {message} @answer' + _THOUGHT
_CALLS = "start: thought? ({calls})" + _THOUGHT
_CALL = '{channel} {header} {constrain} "json" {message} arguments_{index}'


@dataclass(frozen=True)
class Harmony:
    """A vocabulary that has the format's control tokens. ids: of all of `TOKENS`."""

    ids: Mapping[str, int]

    def stop_token_ids(self, others: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end an answer, sorted; others: what the checkpoint's files call so."""
        ends = {*others, self.ids[RETURN], self.ids[CALL]} - {self.ids[END]}
        return tuple(sorted(ends))

    def answer_grammar(self, grammar: str) -> str:
        """A serialised grammar of whole answers whose final message is what the serialised one allows."""
        return framed_grammar(_ANSWER.format_map(self._in_lark()), grammar)

    def call_grammar(self, tools: Sequence[Tool]) -> str:
        """A serialised grammar of whole answers that call one of the tools.

        Raises GrammarError when there are no tools or a tool's parameters are no schema of an object.
        """
        if not tools:
            raise GrammarError("There is no tool to call.")
        tokens = self._in_lark()
        calls, rules = [], []
        for index, tool in enumerate(tools):
            header = json.dumps(f"commentary to=functions.{tool.name} ")
            calls.append(_CALL.format(**tokens, header=header, index=index))
            rules.append(f"arguments_{index}: %json {json.dumps(arguments_schema(tool))}")
        frame = _CALLS.format(**tokens, calls=" | ".join(calls))
        return lark_grammar("\n".join([frame, *rules]))

    def _in_lark(self) -> dict[str, str]:
        return {token.strip("<|>"): f"<[{token_id}]>" for token, token_id in self.ids.items()}


def speaks_harmony(template_source: str) -> bool:
    """Whether the chat template writes messages in this format."""
    return CHANNEL in template_source and MESSAGE in template_source


def detect_harmony(template_source: str, id_of: Callable[[str], int | None]) -> Harmony | None:
    """The format, where the template writes it and the vocabulary has its tokens.

    id_of: the id of a token by its text.
    """
    ids = {token: token_id for token in TOKENS if (token_id := id_of(token)) is not None}
    return Harmony(ids) if speaks_harmony(template_source) and len(ids) == len(TOKENS) else None


def harmony_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the template wants them, which takes little notice of any others.

    It reads one system message, the first; `thinking`, where a message has a call; of several calls in a
    message only the first; and a result's function from the call before it.
    Raises ApiError (400, param messages) when a system message comes later.
    """
    systems = [message["content"] for message in takewhile(_is_system, messages)]
    told: list[dict[str, Any]] = []
    if systems:
        told.append({"role": "system", "content": "\n\n".join(systems)})
    rest = deque(messages[len(systems) :])
    if any(map(_is_system, rest)):
        refusal = "The model's chat template takes system messages only at the beginning."
        raise ApiError(refusal, param="messages", code="invalid_value")
    while rest:
        message = rest.popleft()
        results = []
        while message.get("tool_calls") and rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        told += _one_by_one(message, results) if message.get("tool_calls") else [dict(message)]
    return told


def harmony_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools as the template wants them, which fails on one without a description."""
    return [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]


def _is_system(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("system", "developer")


def _one_by_one(message: Mapping[str, Any], results: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A message of several calls as messages of one call each, with its result behind it."""
    told: list[dict[str, Any]] = []
    # The template writes a text beside a call as a thought, and refuses a text and a thought.
    thinking = "\n\n".join(filter(None, [message.get("reasoning_content"), message["content"]]))
    for call in message["tool_calls"]:
        told.append({"role": "assistant", "content": "", "tool_calls": [call]})
        told += [dict(result) for result in results if result.get("tool_call_id") == call.get("id")]
        results = [result for result in results if result.get("tool_call_id") != call.get("id")]
    if thinking:
        told[0]["thinking"] = thinking
    return [*told, *map(dict, results)]
