"""The messages of a conversation, as requests write them.

Knows the shape of messages; must not know templates or what a model makes of them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from toptwo.api.parameters import CHAT_MESSAGE, ParameterTable
from toptwo.api.strict import StrictModel, contradiction, refuse_kind, shape_of_list

MOST_PARTS = 1_000
MOST_CALLS = 128

_ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES_LATER = ("function",)
_PARTS_LATER = ("image_url", "input_audio", "audio", "video_url", "file", "refusal")


class TextPart(StrictModel):
    """A part of a message's content; text is the only kind so far."""

    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=("text",), later=_PARTS_LATER)


# Parts of 10^5 wrong elements would earn as many error messages; the first one is enough.
Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag("one")] | Annotated[Parts, Tag("many")],
    Discriminator(shape_of_list),
]


class CalledFunction(StrictModel):
    """What the assistant called. arguments: the JSON text of an object, as it was generated."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: str


class ToolCall(StrictModel):
    """One call in an assistant's message."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(StrictModel):
    """One turn of the conversation."""

    table: ClassVar[ParameterTable] = CHAT_MESSAGE

    role: str = Field(json_schema_extra={"enum": list(_ROLES)})
    content: Content | None = None
    name: Annotated[str, StringConstraints(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    reasoning_content: str | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("role", given.get("role"), served=_ROLES, later=_ROLES_LATER)

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise contradiction("tool_calls", "Only an assistant's message has tool calls.")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise contradiction("tool_call_id", "A message of the role tool, and no other, has one.")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing_required_parameter", "Field required", {"field": "content"})
        return self

    @property
    def text(self) -> str:
        """The content as one text; parts are put on lines of their own, as other servers do."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
