"""Tools that a model may call: how they are described to it, and how it is made to call one.

Knows the spellings of tool calls and chat messages as data; must not know templates' code or token ids'
meaning, HTTP or the engine. `calls` reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from toptwo.text.grammar import GrammarError, json_schema, lark_grammar

_MARKERS = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "llama3": "<|python_tag|>",
    "granite": "<|tool_call|>",
}
_SHOWN = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "llama3": ("<|python_tag|>",),
    "granite": ("<|tool_call|>",),
}
MARKER_TOKENS = tuple(token for tokens in _SHOWN.values() for token in tokens)
_MOST_CALLS = 16  # that a grammar allows: a model must come to an end
_NUM_ID_CHARACTERS = 9  # of the ids that Mistral's templates accept


@dataclass(frozen=True)
class Tool:
    """A function of the caller's. parameters: JSON schema of its arguments; {} when it takes none."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False

    def as_openai(self) -> dict[str, Any]:
        """The form that chat templates know."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolFormat:
    """How a model spells its calls. token_ids: those of its markers that are tokens of the vocabulary."""

    name: Literal["hermes", "mistral", "llama3", "granite"]
    token_ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def marker(self) -> str:
        """What calls begin with."""
        return _MARKERS[self.name]

    @property
    def shown_tokens(self) -> tuple[str, ...]:
        """Tokens, perhaps control tokens, that whoever reads calls must see."""
        return tuple(token for token in _SHOWN[self.name] if token in self.token_ids)

    def grammar(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """A serialised grammar: one call of one of the tools, or one and more, and nothing else.

        Raises GrammarError when there are no tools or a tool's parameters are no schema of an object.
        """
        if not tools:
            raise GrammarError("There is no tool to call.")
        rules = []
        for index, tool in enumerate(tools):
            rules.append(f"call_{index}: {self._call(tool.name, f'arguments_{index}')}")
            rules.append(f"arguments_{index}: %json {json.dumps(arguments_schema(tool))}")
        any_call = " | ".join(f"call_{index}" for index in range(len(tools)))
        return lark_grammar("\n".join([*self._frame(parallel), f"call: {any_call}", *rules]))

    def _frame(self, parallel: bool) -> list[str]:
        """The rules of what is around calls."""
        opening = self._token(self.marker)
        if self.name == "granite" or (self.name == "mistral" and not self._names_first):
            return [f'start: {opening} " "? "[" {_several("call", ", ", parallel)} "]"']
        if self.name == "mistral":
            return [f"start: {_several('one', '', parallel)}", f"one: {opening} call"]
        if self.name == "llama3":
            return [f"start: {_several('call', '; ', parallel)}"]
        closing = self._token("</tool_call>")
        return [f"start: {_several('one', chr(10), parallel)}", rf'one: {opening} "\n" call "\n" {closing}']

    def _call(self, name: str, arguments: str) -> str:
        if self.name == "mistral" and self._names_first:
            return f"{json.dumps(name)} {self._token('[ARGS]')} {arguments}"
        key = "parameters" if self.name == "llama3" else "arguments"
        before = f'{{"name": {json.dumps(name)}, "{key}": '
        return f'{json.dumps(before)} {arguments} "}}"'

    def _token(self, text: str) -> str:
        """In Lark: the token, or the text where the vocabulary has no such token."""
        return f"<[{self.token_ids[text]}]>" if text in self.token_ids else json.dumps(text)

    @property
    def _names_first(self) -> bool:
        """Mistral's later models write the name, a mark and the arguments, the earlier ones a list."""
        return "[ARGS]" in self.token_ids


def detect_tool_format(template_source: str, token_ids: Mapping[str, int]) -> ToolFormat:
    """The format that a chat template teaches.

    token_ids: those of MARKER_TOKENS that the vocabulary has.
    """
    if _MARKERS["hermes"] in template_source:
        return ToolFormat("hermes", token_ids)
    if _MARKERS["mistral"] in template_source:
        return ToolFormat("mistral", token_ids)
    if _MARKERS["granite"] in template_source:
        return ToolFormat("granite", token_ids)
    if _MARKERS["llama3"] in template_source or '"parameters"' in template_source:
        return ToolFormat("llama3", token_ids)
    return ToolFormat("hermes", token_ids)


def with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message, with the arguments of its calls as objects where they came as the JSON text of one."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_with_arguments(call, _parsed) for call in calls]}


def messages_for_tools(
    messages: Sequence[Mapping[str, Any]], *, arguments_as_text: bool, short_ids: bool
) -> list[dict[str, Any]]:
    """The messages as templates that know tools want them.

    arguments_as_text: as JSON text, not as objects. short_ids: ids of calls have nine letters or digits.
    """
    prepared = []
    for message in map(with_parsed_arguments, messages):
        if message.get("content") is None:
            message["content"] = ""  # most templates join it to something
        if short_ids and message.get("tool_call_id"):
            message["tool_call_id"] = _short_id(message["tool_call_id"])
        if calls := message.get("tool_calls"):
            if arguments_as_text:
                calls = [_with_arguments(call, _as_text) for call in calls]
            if short_ids:
                calls = [{**call, "id": _short_id(call.get("id") or "")} for call in calls]
            message["tool_calls"] = calls
        prepared.append(message)
    return prepared


def messages_with_written_calls(
    messages: Sequence[Mapping[str, Any]], template_source: str
) -> list[dict[str, Any]]:
    """The messages for templates that know tools and write only texts: calls as the model spells them."""
    form = detect_tool_format(template_source, {})
    told = []
    for message in map(with_parsed_arguments, messages):
        functions = [call["function"] for call in message.pop("tool_calls", None) or ()]
        if functions and form.name == "granite":
            calls = [{"name": f["name"], "arguments": f["arguments"]} for f in functions]
            written = [form.marker + json.dumps(calls, ensure_ascii=False)]
        else:
            written = [_written(function) for function in functions]
        content = "\n".join(filter(None, [message.get("content"), *written]))
        told.append({**message, "content": content})
    return told


def contains_calls(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any message is a call or the result of one."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def messages_without_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, takes_system: bool
) -> list[dict[str, Any]]:
    """The messages for templates that know nothing of tools: all about them is written into the texts.

    takes_system: whether the template has a place for a system message; else the tools are described in
    the first user message.
    """
    told: list[dict[str, Any]] = []
    was_tool = False
    for message in map(with_parsed_arguments, messages):
        text = message.get("content") or ""
        is_tool = message["role"] == "tool"
        if is_tool:
            text = f"<tool_response>\n{text}\n</tool_response>"
        if is_tool and was_tool:  # many templates want users and assistants to take turns
            told[-1]["content"] += f"\n{text}"
        elif is_tool:
            told.append({"role": "user", "content": text})
        else:
            calls = [_written(call["function"]) for call in message.get("tool_calls") or ()]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            told.append({**rest, "content": "\n".join([*filter(None, [text]), *calls])})
        was_tool = is_tool
    if tools:
        _describe(tools, told, takes_system)
    return told


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """What a grammar holds the arguments to. Raises GrammarError when the parameters are no object's."""
    schema = tool.parameters or {"properties": {}, "additionalProperties": False}
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise GrammarError(f"The parameters of the tool '{tool.name[:64]}' must be an object.")
    return json_schema({"type": "object"} | {key: value for key, value in schema.items() if key != "type"})


def _describe(tools: Sequence[Mapping[str, Any]], told: list[dict[str, Any]], takes_system: bool) -> None:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = json.dumps({"name": "<name of the tool>", "arguments": {"<name>": "<value>"}})
    text = (
        "You can call tools. Each line between the tags describes one, as JSON:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call a tool, write its name and its arguments as JSON between these tags, once for each call:\n"
        f"<tool_call>\n{example}\n</tool_call>"
    )
    first = told[0] if told else {"role": ""}
    if first["role"] == "system":
        told[0] = {**first, "content": f"{first['content']}\n\n{text}" if first["content"] else text}
    elif first["role"] == "user" and not takes_system:
        told[0] = {**first, "content": f"{text}\n\n{first['content']}"}
    else:
        told.insert(0, {"role": "system", "content": text})


def _written(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _with_arguments(call: Mapping[str, Any], change: Callable[[object], object]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": change(function.get("arguments"))}}


def _parsed(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _short_id(call_id: str) -> str:
    if len(call_id) == _NUM_ID_CHARACTERS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:_NUM_ID_CHARACTERS]


def _several(rule: str, separator: str, parallel: bool) -> str:
    if not parallel:
        return rule
    more = f"({json.dumps(separator)} {rule})" if separator else rule
    return f"{rule} {more}{{0,{_MOST_CALLS - 1}}}"
