"""A chat completion request as a job: messages to a prompt, tools and formats to a grammar.

Knows OpenAI's request and the model's words; must not know HTTP or the engine.
"""

from __future__ import annotations

import json
from typing import Any

from toptwo.api.job import GenerationJob, JobTicket, Order, OutputForm, Workshop, fit, make_requests
from toptwo.api.message_schema import ChatMessage, ToolCall
from toptwo.api.output_grammar import output_grammar
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.tool_schema import ToolChoiceObject, mode_of
from toptwo.errors import ApiError
from toptwo.messages import LogprobsWanted
from toptwo.text.grammar import GrammarError
from toptwo.text.model import ServedModel
from toptwo.text.template import Message
from toptwo.text.tools import Tool


def chat_job(chat: ChatCompletionRequest, ticket: JobTicket, workshop: Workshop) -> GenerationJob:
    """Render, tokenise and compile. Slow for long chats: call it in a thread.

    Raises ApiError (400) when the template refuses the messages, they do not fit, or a schema is bad.
    """
    model = workshop.model
    mode, tools = mode_of(chat.tool_choice, chat.tools), _tools(chat)
    variables = {} if chat.enable_thinking is None else {"enable_thinking": chat.enable_thinking}
    prompt = model.prompt_of(_messages(chat), tools if mode != "none" else (), variables)
    grammar, param = _grammar(chat, model)
    order = Order(
        prompt_ids=prompt.ids,
        max_tokens=fit(len(prompt.ids), chat.most_tokens, workshop.max_model_len, param="messages"),
        num_choices=chat.num_choices,
        grammar=grammar,
        grammar_param=param,
        logprobs=LogprobsWanted(output=(chat.top_logprobs or 0) if chat.logprobs else None),
    )
    form = OutputForm(
        stops=chat.stops,
        tool_format=None if mode == "none" else model.tool_format,
        # A grammar holds from the first token on and leaves no room for thoughts.
        reasoning=model.reasoning if grammar is None and chat.separate_reasoning is not False else None,
        in_reasoning=prompt.in_reasoning and grammar is None,
        parallel_calls=chat.parallel_tool_calls is not False,
    )
    return GenerationJob(make_requests(chat, order, ticket, workshop), form)


def _tools(chat: ChatCompletionRequest) -> list[Tool]:
    """The functions that the choice leaves."""
    tools = [
        Tool(t.function.name, t.function.description, t.function.parameters or {}, bool(t.function.strict))
        for t in chat.tools or []
    ]
    if isinstance(chat.tool_choice, ToolChoiceObject):
        return [tool for tool in tools if tool.name in chat.tool_choice.names]
    return tools


def _grammar(chat: ChatCompletionRequest, model: ServedModel) -> tuple[str | None, str]:
    """The grammar of the answer, if it has one, and the field that it comes from."""
    if mode_of(chat.tool_choice, chat.tools) != "required":
        return output_grammar(chat, chat.response_format)
    named = isinstance(chat.tool_choice, ToolChoiceObject) and chat.tool_choice.function is not None
    parallel = chat.parallel_tool_calls is not False and not named
    try:
        return model.tool_format.grammar(_tools(chat), parallel=parallel), "tools"
    except GrammarError as error:
        raise ApiError(f"Invalid value for 'tools': {error}", param="tools", code="invalid_value") from None


def _messages(chat: ChatCompletionRequest) -> list[Message]:
    """The conversation as templates know it, which have no developer."""
    return [_message(message, index) for index, message in enumerate(chat.messages)]


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    parts: dict[str, Any] = {
        "role": role,
        "content": message.text,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    if message.tool_calls:
        parts["tool_calls"] = [_call(call, index, at) for at, call in enumerate(message.tool_calls)]
    return {name: value for name, value in parts.items() if value is not None}


def _call(call: ToolCall, index: int, at: int) -> dict[str, Any]:
    """The call with its arguments as an object, which is what templates expect."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
        if not isinstance(arguments, dict):
            raise ValueError
    except (ValueError, RecursionError):
        param = f"messages[{index}].tool_calls[{at}].function.arguments"
        message = f"Invalid value for '{param}': It must be the JSON text of an object."
        raise ApiError(message, param=param, code="invalid_value") from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
