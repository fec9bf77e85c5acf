"""A request for a response as a chat completion request.

Knows both shapes; must not know HTTP, the engine or how an answer is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toptwo.api.chat_translation import chat_request
from toptwo.api.responses_schema import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    ResponsePart,
    ResponsesRequest,
    ToolSelection,
)
from toptwo.api.schemas import ChatCompletionRequest

NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema.name": "text.format.name",
    "response_format.json_schema.schema": "text.format.schema",
    "tool_choice": "tool_choice",
}


@dataclass(frozen=True)
class Abilities:
    """What the model makes of a wish to think: whether it can, and whether an effort means anything to it."""

    thoughts: bool
    effort: bool


def chat_of(request: ResponsesRequest, abilities: Abilities) -> ChatCompletionRequest:
    """The conversation that asks for the same answer. Raises ApiError (400)."""
    effort = None if request.reasoning is None else request.reasoning.effort
    return chat_request(
        {
            "model": request.model,
            "messages": _messages(request),
            "max_completion_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "logprobs": True if request.wants_logprobs else None,
            "top_logprobs": request.top_logprobs if request.wants_logprobs else None,
            "tools": _tools(request),
            "tool_choice": _tool_choice(request),
            "parallel_tool_calls": request.parallel_tool_calls,
            "response_format": _response_format(request),
            "enable_thinking": effort != "none" if effort and abilities.thoughts else None,
            "reasoning_effort": effort if abilities.effort else None,
        },
        NAMES,
    )


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        _add(item, messages)
    return messages


def _add(item: Item, messages: list[dict[str, Any]]) -> None:
    """Put the item into the conversation. A message's calls are items of their own here, not there."""
    match item:
        case MessageItem():
            messages.append({"role": item.role, "content": _text(item.content)})
        case FunctionCallOutputItem():
            content = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        case FunctionCallItem():
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: str | list[ResponsePart]) -> object:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


def _tools(request: ResponsesRequest) -> list[dict[str, Any]] | None:
    if not request.tools:
        return None
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in request.tools
    ]


def _tool_choice(request: ResponsesRequest) -> object:
    choice = request.tool_choice
    if not isinstance(choice, ToolSelection):
        return choice
    if choice.type == "function":
        return {"type": "function", "function": {"name": choice.name}}
    tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools or []]
    allowed = {"mode": choice.mode or "auto", "tools": tools}
    return {"type": "allowed_tools", "allowed_tools": allowed}


def _response_format(request: ResponsesRequest) -> object:
    wanted = None if request.text is None else request.text.format
    if wanted is None or wanted.type != "json_schema":
        return wanted and {"type": wanted.type}
    schema = wanted.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
    return {"type": "json_schema", "json_schema": schema}
