"""What answers look like, for the description of the API; the writers of answers do not use it.

Knows the shape of answers; must not know how they come about. A field that is not always there has a
default here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from toptwo.api.sampling_schema import INT32_MAX, INT64_MAX, MOST_CHOICES, TokenId
from toptwo.api.token_text import LEAST_LOGPROB

Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
Index = Annotated[int, Field(ge=0, lt=MOST_CHOICES)]
Seconds = Annotated[int, Field(ge=0, le=INT64_MAX, description="Since 1970.")]
# A rounding error above the logarithm of 1.
LogProbability = Annotated[float, Field(ge=LEAST_LOGPROB, le=0.001)]
MOST = Field(max_length=INT32_MAX)  # as many as tokens can be
Data = Annotated[list[Annotated[int, Field(ge=0, le=255)]], MOST]
FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """A JSON object of an answer; it has no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class OpenAnswer(BaseModel):
    """A JSON object of an answer of which only the fields that never change are described."""

    model_config = ConfigDict(strict=True, extra="allow")


class ErrorBody(Answer):
    """What went wrong. param: the field of the request that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(Answer):
    """OpenAI's form of every error."""

    error: ErrorBody


class AnthropicErrorBody(Answer):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorEnvelope(Answer):
    """Anthropic's form of every error."""

    type: Literal["error"]
    error: AnthropicErrorBody


class Health(Answer):
    """Whether the server lives, or would serve a request. reason: why not."""

    status: Literal["live", "ready", "unready"]
    reason: str | None = None


class Model(Answer):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: Seconds
    owned_by: str


class ModelList(Answer):
    """All models that requests may name."""

    object: Literal["list"]
    data: Annotated[list[Model], Field(max_length=1000)]


class PromptDetails(Answer):
    """cached_tokens: those whose computation was remembered."""

    cached_tokens: Count


class OutputDetails(Answer):
    """reasoning_tokens: those that were thoughts."""

    reasoning_tokens: Count


class TokenCounts(Answer):
    """Tokens of the prompt and of all choices together."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails | None = None


class LikelyToken(Answer):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: LogProbability
    bytes: Data


class ReportedToken(LikelyToken):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: Annotated[list[LikelyToken], Field(max_length=20)]


class Logprobs(Answer):
    """Reports on the tokens of a choice."""

    content: Annotated[list[ReportedToken], MOST]
    refusal: None


class CalledFunctionAnswer(Answer):
    """arguments: the JSON text of an object."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call that the model wants to be made."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AssistantMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCallAnswer], MOST] | None = None


class ChatChoice(Answer):
    """One of the answers."""

    index: Index
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class AnswerHead(Answer):
    """system_fingerprint: changes when the same seed may give other tokens."""

    id: str
    created: Seconds
    model: str
    system_fingerprint: str


class ChatCompletion(AnswerHead):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1, max_length=MOST_CHOICES)]
    usage: TokenCounts


class FunctionDelta(Answer):
    """The name comes first, then the arguments piece by piece."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """The next piece of the call with this index."""

    index: Count
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class MessageDelta(Answer):
    """The next piece of the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCallDelta], MOST] | None = None


class ChunkChoice(Answer):
    """The next piece of one of the answers."""

    index: Index
    delta: MessageDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(AnswerHead):
    """The data of one event of a stream. usage: with include_usage null, but in the last chunk."""

    object: Literal["chat.completion.chunk"]
    choices: Annotated[list[ChunkChoice], Field(max_length=1)]
    usage: TokenCounts | None = None


class TextLogprobs(Answer):
    """Reports on tokens, column by column. null: a first token, which nothing came before."""

    tokens: Annotated[list[str], MOST]
    token_logprobs: Annotated[list[LogProbability | None], MOST]
    top_logprobs: Annotated[list[Annotated[dict[str, LogProbability], Field(max_length=21)] | None], MOST]
    text_offset: Annotated[list[Count], MOST]


class TextChoice(Answer):
    """One of the texts. finish_reason: null only in a stream."""

    index: Index
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(AnswerHead):
    """Texts, whole or as the data of one event of a stream. usage: always there when whole."""

    object: Literal["text_completion"]
    choices: Annotated[list[TextChoice], Field(max_length=MOST_CHOICES)]
    usage: TokenCounts | None = None


class ResponseUsage(OpenAnswer):
    """Token counts of a response."""

    input_tokens: Count
    output_tokens: Count
    total_tokens: Count


class ResponseItem(OpenAnswer):
    """A message, a thought or a call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseObject(OpenAnswer):
    """An answer in the form of OpenAI's responses."""

    id: str
    object: Literal["response"]
    created_at: Seconds
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: Annotated[list[ResponseItem], MOST]
    usage: ResponseUsage | None


class ResponseEvent(OpenAnswer):
    """The data of one event of a streamed response; its type is the event's name."""

    type: str
    sequence_number: Count


class MessageUsage(Answer):
    """Token counts of a message; input_tokens are those that were not read from the cache."""

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    output_tokens: Count


class MessageBlock(OpenAnswer):
    """A text, a thought or a call."""

    type: Literal["text", "thinking", "tool_use"]


class MessageAnswer(Answer):
    """An answer in the form of Anthropic's messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: Annotated[list[MessageBlock], MOST]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(OpenAnswer):
    """The data of one event of a streamed message; its type is the event's name."""

    type: str


class InputTokens(Answer):
    """How many tokens the prompt of a conversation has."""

    input_tokens: Count


class Tokens(Answer):
    """Token ids. max_model_len: how many fit, with those of the answer."""

    count: Count
    max_model_len: Count
    tokens: Annotated[list[TokenId], MOST]
    token_strs: Annotated[list[str], MOST] | None = None


class Text(Answer):
    """The text of token ids."""

    prompt: str


class ApiDescription(OpenAnswer):
    """This document."""

    openapi: str
    paths: dict[str, Any]
