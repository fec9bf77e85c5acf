"""What a request for a response may say.

Knows the shape of the request; must not know HTTP, the model or the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from toptwo.api.message_schema import MOST_PARTS
from toptwo.api.parameters import ParameterTable, any_of, anything
from toptwo.api.sampling_schema import INT32_MAX
from toptwo.api.schemas import MOST_MESSAGES
from toptwo.api.strict import StrictModel, contradiction, refuse_kind, shape_of_list, shape_of_object
from toptwo.api.tool_schema import Description, Name

RESPONSES_REQUEST = ParameterTable(
    harmless={
        "max_tool_calls": anything,  # of tools that servers run
        "prompt_cache_key": anything,
        "prompt_cache_options": anything,
        "prompt_cache_retention": anything,
        "safety_identifier": anything,
        "service_tier": any_of("auto", "default"),
        "store": any_of(True, False),
        "stream_options": anything,
        "user": anything,
    },
    neutral={
        "background": any_of(False),
        "context_management": any_of(),
        "conversation": any_of(),
        "moderation": any_of(),
        "previous_response_id": any_of(),
        "prompt": any_of(),
        "truncation": any_of("disabled"),
    },
)
# What answers of ours and of others contain, and callers send back.
_ITEM = ParameterTable(neutral={"id": anything, "status": anything, "phase": anything})
_PART = ParameterTable(neutral={"annotations": anything, "logprobs": anything})
_THOUGHT = ParameterTable(
    neutral=dict.fromkeys(("id", "status", "summary", "content", "encrypted_content"), anything)
)

_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_ITEMS_LATER = (
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "compaction",
    "computer_call",
    "computer_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "file_search_call",
    "image_generation_call",
    "item_reference",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "shell_call",
    "shell_call_output",
    "web_search_call",
)
_TOOLS_LATER = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "namespace",
    "shell",
    "tool_search",
    "web_search",
    "web_search_preview",
)
_PARTS = ("input_text", "output_text")
_PARTS_LATER = ("input_image", "input_file", "input_audio", "refusal")

CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


class ResponsePart(StrictModel):
    """A part of a text, the caller's or the model's."""

    table: ClassVar[ParameterTable] = _PART

    type: Literal["input_text", "output_text"]
    text: str

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=_PARTS, later=_PARTS_LATER)


Text = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[ResponsePart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True), Tag("many")],
    Discriminator(shape_of_list),
]


class MessageItem(StrictModel):
    """One turn of the conversation."""

    table: ClassVar[ParameterTable] = _ITEM

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=_ITEMS, later=_ITEMS_LATER)


class FunctionCallItem(StrictModel):
    """A call that the model made. arguments: the JSON text of an object."""

    table: ClassVar[ParameterTable] = _ITEM

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: str


class FunctionCallOutputItem(StrictModel):
    """What a call gave."""

    table: ClassVar[ParameterTable] = _ITEM

    type: Literal["function_call_output"]
    call_id: CallId
    output: Text


class ReasoningItem(StrictModel):
    """A thought of an earlier answer, which models are not shown again."""

    table: ClassVar[ParameterTable] = _THOUGHT

    type: Literal["reasoning"]


def _item_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) and kind in _ITEMS else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_kind),
]
Input = Annotated[
    Annotated[str, Tag("one")]
    | Annotated[list[Item], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True), Tag("many")],
    Discriminator(shape_of_list),
]


class FunctionTool(StrictModel):
    """A function that the caller can run. parameters: JSON schema of its arguments, an object."""

    type: Literal["function"]
    name: Name
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=("function",), later=_TOOLS_LATER)


class ToolName(StrictModel):
    """One of the request's tools."""

    type: Literal["function"]
    name: Name


class ToolSelection(StrictModel):
    """A choice that names tools: one function, or those allowed."""

    type: Literal["function", "allowed_tools"]
    name: Name | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ToolName], Field(min_length=1, max_length=128, fail_fast=True)] | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        served = ("function", "allowed_tools")
        refuse_kind("type", given.get("type"), served=served, later=_TOOLS_LATER)

    @model_validator(mode="after")
    def _check_kind(self) -> ToolSelection:
        needed = "name" if self.type == "function" else "tools"
        if getattr(self, needed) is None:
            raise contradiction(needed, f"It is needed where type is '{self.type}'.")
        return self


ToolSelector = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[ToolSelection, Tag("object")],
    Discriminator(shape_of_object),
]


class TextFormat(StrictModel):
    """What the answer looks like; name and schema belong to json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Description | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(StrictModel):
    """How the answer's text is to be."""

    table: ClassVar[ParameterTable] = ParameterTable(neutral={"verbosity": any_of("medium")})

    format: TextFormat | None = None


class ReasoningOptions(StrictModel):
    """Whether to think, "none" is no thought, and how much, where the model's template knows efforts."""

    table: ClassVar[ParameterTable] = ParameterTable(
        neutral=dict.fromkeys(("context", "generate_summary", "mode", "summary"), anything)
    )

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


Included = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesRequest(StrictModel):
    """The body of POST /responses, as far as it is served. Nothing is kept for a later request."""

    table: ClassVar[ParameterTable] = RESPONSES_REQUEST

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Annotated[list[Included], Field(max_length=32, fail_fast=True)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolSelector | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Metadata | None = None
    stream: bool | None = None

    def ignored_inside(self) -> list[str]:
        """See StrictModel."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return ["reasoning.effort"] if effort not in (None, "none") else []

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's tokens are reported on."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())
