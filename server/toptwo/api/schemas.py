"""What a chat completion request may say: types, bounds, and which messages are understood.

Types are strict ("1" and true are no numbers), every number has both bounds, and null stands for the
default. Knows the shape of requests; must not know HTTP, the model or the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from toptwo.api.parameters import CHAT_MESSAGE, CHAT_REQUEST, NOTHING_ELSE, ParameterTable, unsupported

INT64_MAX = 2**63 - 1
MOST_MESSAGES = 10_000
MOST_PARTS = 1_000

_ROLES = ("system", "developer", "user", "assistant")
_ROLES_LATER = ("tool", "function")
_PARTS_LATER = ("image_url", "input_audio", "audio", "video_url", "file", "refusal")


class StrictModel(BaseModel):
    """A JSON object of the request. Fields that it does not serve are judged by its `table`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    table: ClassVar[ParameterTable] = NOTHING_ELSE

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        cls.refuse_kind(given)
        return cls.table.strip(given, cls.model_fields)

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        """Raise PydanticCustomError when the object as a whole is of a kind that is not served."""


class TextPart(StrictModel):
    """A part of a message's content; text is the only kind so far."""

    type: str = Field(json_schema_extra={"enum": ["text"]})
    text: str

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        _refuse_kind("type", given.get("type"), served=("text",), later=_PARTS_LATER)


def _shape_of_list(value: object) -> str:
    return "many" if isinstance(value, list) else "one"


# Parts of 10^5 wrong elements would earn as many error messages; the first one is enough.
Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag("one")] | Annotated[Parts, Tag("many")],
    Discriminator(_shape_of_list),
]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopText, Tag("one")]
    | Annotated[list[StopText], Field(max_length=4, fail_fast=True), Tag("many")],
    Discriminator(_shape_of_list),
]


class ChatMessage(StrictModel):
    """One turn of the conversation."""

    table: ClassVar[ParameterTable] = CHAT_MESSAGE

    role: str = Field(json_schema_extra={"enum": list(_ROLES)})
    content: Content
    name: Annotated[str, StringConstraints(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None

    @classmethod
    def refuse_kind(cls, given: dict[str, object]) -> None:
        _refuse_kind("role", given.get("role"), served=_ROLES, later=_ROLES_LATER)

    @property
    def text(self) -> str:
        """The content as one text; parts are put on lines of their own, as other servers do."""
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)


class StreamOptions(StrictModel):
    """include_usage: end the stream with a chunk that carries the token counts."""

    include_usage: bool | None = None
    # Padding against eavesdropping on chunk sizes; it changes nothing that a client reads.
    include_obfuscation: bool | None = None


class ChatCompletionRequest(StrictModel):
    """The body of POST /chat/completions, as far as it is served."""

    table: ClassVar[ParameterTable] = CHAT_REQUEST

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    stop: Stop | None = None
    ignore_eos: bool | None = Field(None, description="Generate on past the token that ends an answer.")
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _check_together(self) -> ChatCompletionRequest:
        if self.n not in (None, 1):
            raise unsupported("n", "Only one choice per request is supported.")
        if self.stream_options is not None and not self.stream:
            raise _contradiction("stream_options", "It is only allowed when stream is true.")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise _contradiction("max_tokens", "It contradicts max_completion_tokens; give one of them.")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The caller's bound on generated tokens, under either of its names."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however many were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _refuse_kind(name: str, value: object, *, served: tuple[str, ...], later: tuple[str, ...]) -> None:
    """Speak about the kind before anything else: the other fields of an image part are no mistake."""
    if not isinstance(value, str) or value in served:
        return  # a wrong type is the schema's to report
    choices = ", ".join(served)
    if value in later:
        raise unsupported(name, f"'{value}' is not supported; supported: {choices}.")
    raise PydanticCustomError(
        "invalid_value", "{message}", {"message": f"Supported values: {choices}.", "field": name}
    )


def _contradiction(name: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{message}", {"message": message, "field": name})
