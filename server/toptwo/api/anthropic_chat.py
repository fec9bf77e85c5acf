"""A request in Anthropic's format as a chat completion request.

Knows both shapes; must not know HTTP, the engine or how an answer is written.
"""

from __future__ import annotations

from typing import Any

import orjson

from toptwo.api.anthropic_schema import (
    AnthropicMessage,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from toptwo.api.chat_translation import chat_request
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.errors import ApiError

NAMES = {
    "max_completion_tokens": "max_tokens",
    "messages": "messages",
    "stop": "stop_sequences",
    "tool_choice": "tool_choice",
    "tools": "tools",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# The word that a failed call's result begins with: a chat's result has no other place for it.
_FAILED = "Error: "


def chat_of(request: CountTokensRequest, *, can_think: bool) -> ChatCompletionRequest:
    """The conversation that asks for the same answer, or for the same prompt. Raises ApiError (400)."""
    choice = request.tool_choice
    conversation: dict[str, object] = {
        "model": request.model,
        "messages": _messages(request),
        "tools": _tools(request),
        "tool_choice": _tool_choice(request),
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "enable_thinking": wants_thoughts(request, can_think=can_think) if can_think else None,
    }
    if isinstance(request, MessagesRequest):
        conversation |= {
            "max_completion_tokens": request.max_tokens,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
        }
    return chat_request(conversation, NAMES)


def wants_thoughts(request: CountTokensRequest, *, can_think: bool) -> bool:
    """Whether the caller expects thoughts; only who asks for them does.

    Raises ApiError (400) when the model is told to think and cannot.
    """
    kind = "disabled" if request.thinking is None else request.thinking.type
    if kind == "enabled" and not can_think:
        message = "Invalid value for 'thinking.type': This model cannot think before it answers."
        raise ApiError(message, param="thinking.type", code="unsupported_parameter")
    return can_think and kind != "disabled"


def _messages(request: CountTokensRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
    for message in request.messages:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        else:
            messages += _user(message) if message.role == "user" else [_assistant(message)]
    return messages


def _user(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Results of calls are messages of their own; texts side by side stay together."""
    messages: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            text = _FAILED * bool(block.is_error) + _text(block.content or "")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
        elif isinstance(block, TextBlock):
            if not messages or messages[-1]["role"] != "user":
                messages.append({"role": "user", "content": []})
            messages[-1]["content"].append({"type": "text", "text": block.text})
    return messages


def _assistant(message: AnthropicMessage) -> dict[str, Any]:
    blocks = [block for block in message.content if not isinstance(block, str)]
    texts = [{"type": "text", "text": block.text} for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    parts: dict[str, Any] = {
        "role": "assistant",
        "content": texts or (None if calls else ""),
        "reasoning_content": "\n".join(thoughts) or None,
        "tool_calls": calls or None,
    }
    return {name: value for name, value in parts.items() if value is not None}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tools(request: CountTokensRequest) -> list[dict[str, Any]] | None:
    if not request.tools:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in request.tools
    ]


def _tool_choice(request: CountTokensRequest) -> object:
    choice = request.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _CHOICES[choice.type]
