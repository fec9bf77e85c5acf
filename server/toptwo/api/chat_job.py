"""A chat completion request as a job: messages to a prompt, tools and formats to a grammar.

Knows OpenAI's request and the model's words; must not know HTTP or the engine.
"""

from __future__ import annotations

import json
from typing import Any

from toptwo.api.job import (
    GenerationJob,
    JobTicket,
    Order,
    OutputForm,
    Workshop,
    fit,
    make_requests,
    prompt_too_long,
)
from toptwo.api.message_schema import ChatMessage, ToolCall
from toptwo.api.output_grammar import output_grammar
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.tool_schema import ToolChoiceObject, mode_of
from toptwo.errors import ApiError
from toptwo.messages import LogprobsWanted
from toptwo.text.grammar import GrammarError
from toptwo.text.harmony import EFFORTS
from toptwo.text.model import ServedModel
from toptwo.text.template import Message
from toptwo.text.tokenizer import TooManyTokensError
from toptwo.text.tools import Tool


def chat_job(chat: ChatCompletionRequest, ticket: JobTicket, workshop: Workshop) -> GenerationJob:
    """Render and tokenise. Slow for long chats: call it in a thread.

    Raises ApiError (400) when the template refuses the messages, they do not fit, or a schema is bad.
    """
    model = workshop.model
    mode, tools = mode_of(chat.tool_choice, chat.tools), _tools(chat)
    shown, most = tools if mode != "none" else (), workshop.max_model_len
    try:
        prompt = model.prompt_of(_messages(chat), shown, _variables(chat, model), most)
    except TooManyTokensError:
        raise prompt_too_long(f"at least {most + 1}", most, param="messages") from None
    grammar, param = _grammar(chat, model)
    # A grammar holds from the first token on, and leaves room for thoughts in Harmony only.
    has_thoughts = grammar is None or model.harmony is not None
    order = Order(
        prompt_ids=prompt.ids,
        max_tokens=fit(len(prompt.ids), chat.most_tokens, workshop.max_model_len, param="messages"),
        num_choices=chat.num_choices,
        grammar=grammar,
        logprobs=LogprobsWanted(output=(chat.top_logprobs or 0) if chat.logprobs else None),
    )
    form = OutputForm(
        stops=chat.stops,
        tool_format=None if mode == "none" else model.tool_format,
        reasoning=model.reasoning if has_thoughts and chat.separate_reasoning is not False else None,
        harmony=model.harmony,
        in_reasoning=prompt.in_reasoning and has_thoughts,
        parallel_calls=chat.parallel_tool_calls is not False,
    )
    return GenerationJob(make_requests(chat, order, ticket, workshop), form, param)


def _tools(chat: ChatCompletionRequest) -> list[Tool]:
    """The functions that the choice leaves."""
    tools = [
        Tool(t.function.name, t.function.description, t.function.parameters or {}, bool(t.function.strict))
        for t in chat.tools or []
    ]
    if isinstance(chat.tool_choice, ToolChoiceObject):
        return [tool for tool in tools if tool.name in chat.tool_choice.names]
    return tools


def _variables(chat: ChatCompletionRequest, model: ServedModel) -> dict[str, Any]:
    """What the template may look up. Raises ApiError (400) for an effort that the model does not know."""
    variables = dict(chat.chat_template_kwargs or {})
    if chat.enable_thinking is not None:
        variables["enable_thinking"] = chat.enable_thinking
    effort = chat.reasoning_effort
    if effort == "none" and not model.looks_up("reasoning_effort"):
        variables.setdefault("enable_thinking", False)
    elif effort is not None:
        if not model.looks_up("reasoning_effort"):
            raise _bad_effort("This model has no such setting.")
        if model.harmony is not None and effort not in EFFORTS:
            raise _bad_effort(f"Supported values for this model: {', '.join(EFFORTS)}.")
        variables["reasoning_effort"] = effort
    return variables


def _bad_effort(rule: str) -> ApiError:
    message = f"Invalid value for 'reasoning_effort': {rule}"
    return ApiError(message, param="reasoning_effort", code="unsupported_parameter")


def _grammar(chat: ChatCompletionRequest, model: ServedModel) -> tuple[str | None, str]:
    """The grammar of all that is generated, if there is one, and the field that it comes from."""
    if mode_of(chat.tool_choice, chat.tools) != "required":
        grammar, param = output_grammar(chat, chat.response_format)
        return (None if grammar is None else model.answer_grammar(grammar)), param
    named = isinstance(chat.tool_choice, ToolChoiceObject) and chat.tool_choice.function is not None
    parallel = chat.parallel_tool_calls is not False and not named
    try:
        return model.call_grammar(_tools(chat), parallel=parallel), "tools"
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
