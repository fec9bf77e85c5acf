"""What a request for a message may say, in Anthropic's format.

Knows the shape of the request; must not know HTTP, the model or the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from toptwo.api.message_schema import MOST_PARTS
from toptwo.api.parameters import ParameterTable, any_of, anything
from toptwo.api.sampling_schema import INT32_MAX, StopText
from toptwo.api.schemas import MOST_MESSAGES
from toptwo.api.strict import StrictModel, contradiction, refuse_kind, shape_of_list
from toptwo.api.tool_schema import Description, Name


def _only_effort(value: object) -> bool:
    return isinstance(value, dict) and set(value) <= {"effort"}


_HARMLESS = {
    "cache_control": anything,  # prompts are cached anyway
    "context_management": anything,
    "metadata": anything,
    "output_config": _only_effort,
    "service_tier": any_of("auto", "standard_only"),
}
_NEUTRAL = {
    "container": any_of(),
    "inference_geo": any_of(),
    "mcp_servers": any_of([]),
    "output_format": any_of(),
    "speed": any_of("standard"),
}
MESSAGES_REQUEST = ParameterTable(harmless=_HARMLESS, neutral=_NEUTRAL)
_MOST_OF_COUNTING = dict.fromkeys(("max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p"))
COUNT_REQUEST = ParameterTable(
    harmless={**_HARMLESS, **dict.fromkeys(_MOST_OF_COUNTING, anything)}, neutral=_NEUTRAL
)
_BLOCK = ParameterTable(neutral={"cache_control": anything, "citations": any_of([])})
_TOOL = ParameterTable(
    neutral={
        "allowed_callers": any_of(["direct"]),
        "cache_control": anything,
        "defer_loading": any_of(False),
        "eager_input_streaming": anything,
        "input_examples": any_of([]),
    }
)

_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")
_BLOCKS_LATER = (
    "container_upload",
    "document",
    "image",
    "mcp_tool_result",
    "mcp_tool_use",
    "search_result",
    "server_tool_use",
    "web_fetch_tool_result",
    "web_search_tool_result",
)

CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class TextBlock(StrictModel):
    """A text."""

    table: ClassVar[ParameterTable] = _BLOCK

    type: Literal["text"]
    text: str

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=("text",), later=(*_BLOCKS[1:], *_BLOCKS_LATER))


class ToolUseBlock(StrictModel):
    """A call that the model made."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"cache_control": anything, "caller": anything})

    type: Literal["tool_use"]
    id: CallId
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: dict[str, Any]


TextBlocks = Annotated[list[TextBlock], Field(max_length=MOST_PARTS, fail_fast=True)]
Text = Annotated[
    Annotated[str, Tag("one")] | Annotated[TextBlocks, Tag("many")], Discriminator(shape_of_list)
]


class ToolResultBlock(StrictModel):
    """What a call gave."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"cache_control": anything})

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Text | None = None
    is_error: bool | None = None


class ThinkingBlock(StrictModel):
    """A thought of an earlier answer."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"signature": anything})

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(StrictModel):
    """A thought that nobody here can read."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"data": anything})

    type: Literal["redacted_thinking"]


def _block_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) and kind in _BLOCKS else "text"


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")],
    Discriminator(_block_kind),
]
_BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
}


class AnthropicMessage(StrictModel):
    """One turn of the conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[list[Block], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag("many")],
        Discriminator(shape_of_list),
    ]

    @model_validator(mode="after")
    def _check_role(self) -> AnthropicMessage:
        kinds = [] if isinstance(self.content, str) else [block.type for block in self.content]
        if any(kind not in _BLOCKS_OF[self.role] for kind in kinds):
            served = ", ".join(_BLOCKS_OF[self.role])
            raise contradiction("content", f"With the role {self.role} it may hold: {served}.")
        return self


class AnthropicTool(StrictModel):
    """A function that the caller can run. input_schema: JSON schema of its input, an object."""

    table: ClassVar[ParameterTable] = _TOOL

    type: Literal["custom"] | None = None
    name: Name
    description: Description | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        kind = given.get("type")
        later = (kind,) if isinstance(kind, str) else ()  # names of server tools end in a date
        refuse_kind("type", kind, served=("custom",), later=later)


class AnthropicToolChoice(StrictModel):
    """Whether and which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> AnthropicToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise contradiction("name", "It is needed where type is 'tool', and nowhere else.")
        return self


class ThinkingOptions(StrictModel):
    """Whether to think before the answer. The budget is not kept."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"display": any_of("summarized")})

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=INT32_MAX)


class CountTokensRequest(StrictModel):
    """The body of POST /messages/count_tokens: a conversation."""

    table: ClassVar[ParameterTable] = COUNT_REQUEST

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    system: Text | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingOptions | None = None

    @model_validator(mode="after")
    def _check_last_message(self) -> CountTokensRequest:
        if self.messages[-1].role == "assistant":
            raise contradiction("messages", "The last one must be the user's: answers cannot be prefilled.")
        return self

    def ignored_inside(self) -> list[str]:
        """See StrictModel."""
        budget = None if self.thinking is None else self.thinking.budget_tokens
        return [] if budget is None else ["thinking.budget_tokens"]


class MessagesRequest(CountTokensRequest):
    """The body of POST /messages, as far as it is served."""

    table: ClassVar[ParameterTable] = MESSAGES_REQUEST

    max_tokens: int = Field(ge=1, le=INT32_MAX)
    stop_sequences: Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0 keeps all tokens.")
    stream: bool | None = None
