"""Tools that a model may call, and the form that its answer must have.

Knows the shape of requests; must not know how a call or a form is enforced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from toptwo.api.strict import StrictModel, contradiction, refuse_kind, shape_of_object

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Description = Annotated[str, StringConstraints(max_length=64 * 1024)]


class FunctionParameter(StrictModel):
    """A function that the caller can run. parameters: JSON schema of its arguments, an object."""

    name: Name
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParameter(StrictModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionParameter

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=("function",), later=("custom",))


class FunctionName(StrictModel):
    """A function of the request's tools."""

    name: Name


class NamedTool(StrictModel):
    """One of the request's tools."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(StrictModel):
    """Some of the request's tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128, fail_fast=True)]


class ToolChoiceObject(StrictModel):
    """A choice that names tools: one function, or those allowed."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        refuse_kind("type", given.get("type"), served=("function", "allowed_tools"), later=("custom",))

    @model_validator(mode="after")
    def _check_kind(self) -> ToolChoiceObject:
        if getattr(self, self.type) is None:
            raise contradiction(self.type, f"It is needed where type is '{self.type}'.")
        return self

    @property
    def names(self) -> list[str]:
        """The functions that may be called."""
        if self.type == "function" and self.function:
            return [self.function.name]
        return [tool.function.name for tool in self.allowed_tools.tools] if self.allowed_tools else []


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[ToolChoiceObject, Tag("object")],
    Discriminator(shape_of_object),
]


class JsonSchemaFormat(StrictModel):
    """A schema that the answer obeys; it always does, whether strict is asked for or not."""

    name: Name
    description: Description | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise contradiction("json_schema", "It is needed where type is 'json_schema', and nowhere else.")
        return self


def mode_of(choice: str | ToolChoiceObject | None, tools: Sequence[ToolParameter] | None) -> str:
    """ "none", "auto" or "required"; a named function is required."""
    if not tools:
        return "none"
    if isinstance(choice, ToolChoiceObject):
        return choice.allowed_tools.mode if choice.allowed_tools else "required"
    return choice or "auto"


def check_tool_choice(choice: str | ToolChoiceObject | None, tools: Sequence[ToolParameter]) -> None:
    """Raise PydanticCustomError when tools have the same name, or the choice is none of them."""
    known = [tool.function.name for tool in tools]
    if len(set(known)) < len(known):
        raise contradiction("tools", "Two of the functions have the same name.")
    if isinstance(choice, ToolChoiceObject):
        missing = [name for name in choice.names if name not in known]
        if missing:
            raise contradiction("tool_choice", "It names a function that is not among the tools.")
    elif choice == "required" and not known:
        raise contradiction("tool_choice", "'required' needs tools.")
