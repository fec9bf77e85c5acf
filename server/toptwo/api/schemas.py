"""What a chat completion request may say.

Knows the shape of the request; must not know HTTP, the model or the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from toptwo.api.message_schema import ChatMessage
from toptwo.api.output_grammar import check_one_grammar
from toptwo.api.parameters import CHAT_REQUEST, ParameterTable, unsupported
from toptwo.api.sampling_schema import INT32_MAX, SamplingFields
from toptwo.api.strict import contradiction
from toptwo.api.tool_schema import ResponseFormat, ToolChoice, ToolParameter, check_tool_choice, mode_of

MOST_MESSAGES = 10_000
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TemplateVariables = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")], Any],
    Field(max_length=32),
]


class ChatCompletionRequest(SamplingFields):
    """The body of POST /chat/completions, as far as it is served."""

    table: ClassVar[ParameterTable] = CHAT_REQUEST

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ToolParameter], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = Field(None, description="For models that can think before they answer.")
    reasoning_effort: Effort | None = Field(None, description="For models whose template knows efforts.")
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="What the model's template may look up besides the messages and tools."
    )
    separate_reasoning: bool | None = Field(None, description="Whether thoughts go to reasoning_content.")

    @model_validator(mode="after")
    def _check_together(self) -> ChatCompletionRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise contradiction("max_tokens", "It contradicts max_completion_tokens; give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise contradiction("top_logprobs", "It is only allowed when logprobs is true.")
        for name in ("enable_thinking", "reasoning_effort"):
            given = (self.chat_template_kwargs or {}).get(name)
            if None not in (given, getattr(self, name)) and given != getattr(self, name):
                raise contradiction(name, "It contradicts chat_template_kwargs; give one of them.")
        check_tool_choice(self.tool_choice, self.tools or [])
        names = check_one_grammar(self, self.response_format)
        if names and mode_of(self.tool_choice, self.tools) != "none":
            raise unsupported(names[0], "With tools it is only supported when tool_choice is 'none'.")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The caller's bound on generated tokens, under either of its names."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens
