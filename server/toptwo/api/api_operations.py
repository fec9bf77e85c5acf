"""What each route takes and answers, as a table.

Knows schemas and status codes; must not know how the table is written down or how a route works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from toptwo.accounts.usage import GROUPINGS
from toptwo.api import response_schemas as shapes
from toptwo.api.account_shapes import KeyDescription, UsageList
from toptwo.api.anthropic_schema import CountTokensRequest, MessagesRequest
from toptwo.api.responses_schema import ResponsesRequest
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.text_completion_schema import CompletionRequest
from toptwo.api.tokens import DetokenizeRequest, TokenizeRequest

ERRORS = {
    400: "The request is wrong; param names the field.",
    401: "There is no key, or it is not valid.",
    403: "The key is not allowed to do this.",
    404: "There is no such model, or no account behind the key.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "A limit of the key or of its account is reached, or its credit.",
    500: "The server failed.",
    501: "This server cannot do that.",
    503: "The server is full or shutting down, or the model is not ready.",
}
_OF_KEYS = (401, 403, 429, 500, 503)
_OF_BODIES = (400, 401, 403, 404, 408, 413, 429, 500, 503)


@dataclass(frozen=True)
class Operation:
    """One path and what its methods do.

    name: unique. path: behind the prefix. answers: what comes with a status that is no error.
    event: the data of a stream's events, where the answer can be streamed.
    has_named_events: whether their names are their data's type; if not, the stream ends with [DONE].
    security: names of the schemes of which one is needed; None stands for the document's.
    error: the form of errors. query: the schemas of the query's parameters, by their names.
    """

    name: str
    path: str
    summary: str
    answers: Mapping[int, type[BaseModel]]
    errors: tuple[int, ...] = _OF_BODIES
    methods: tuple[str, ...] = ("POST",)
    tag: str = "openai"
    body: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    has_named_events: bool = False
    security: tuple[str, ...] | None = None
    error: type[BaseModel] = shapes.ErrorEnvelope
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def schemas(self) -> set[type[BaseModel]]:
        """All that it refers to."""
        return {kind for kind in (*self.answers.values(), self.body, self.event, self.error) if kind}


_BY = "|".join(GROUPINGS)
_ANTHROPIC: dict[str, Any] = {
    "tag": "anthropic",
    "security": ("bearer", "anthropic"),
    "error": shapes.AnthropicErrorEnvelope,
}

OPERATIONS = (
    Operation(
        "chat_completions",
        "/chat/completions",
        "Answer a conversation.",
        {200: shapes.ChatCompletion},
        body=ChatCompletionRequest,
        event=shapes.ChatCompletionChunk,
    ),
    Operation(
        "completions",
        "/completions",
        "Continue texts.",
        {200: shapes.TextCompletion},
        body=CompletionRequest,
        event=shapes.TextCompletion,
    ),
    Operation(
        "responses",
        "/responses",
        "Answer a conversation, in the form of OpenAI's responses; nothing is kept.",
        {200: shapes.ResponseObject},
        body=ResponsesRequest,
        event=shapes.ResponseEvent,
        has_named_events=True,
    ),
    Operation(
        "messages",
        "/messages",
        "Answer a conversation, in the form of Anthropic's messages.",
        {200: shapes.MessageAnswer},
        body=MessagesRequest,
        event=shapes.MessageEvent,
        has_named_events=True,
        **_ANTHROPIC,
    ),
    Operation(
        "count_tokens",
        "/messages/count_tokens",
        "Count the tokens of a conversation, in the form of Anthropic's messages.",
        {200: shapes.InputTokens},
        body=CountTokensRequest,
        **_ANTHROPIC,
    ),
    Operation(
        "models",
        "/models",
        "List the models.",
        {200: shapes.ModelList},
        _OF_KEYS,
        ("GET",),
    ),
    Operation(
        "model",
        "/models/{model_id}",
        "Describe a model.",
        {200: shapes.Model},
        (*_OF_KEYS, 404),
        ("GET",),
    ),
    Operation(
        "embeddings",
        "/embeddings",
        "Not implemented: this server generates text.",
        {},
        (*_OF_KEYS, 501),
    ),
    Operation(
        "tokenize",
        "/tokenize",
        "The token ids of a text or of a conversation.",
        {200: shapes.Tokens},
        tag="tokens",
        body=TokenizeRequest,
    ),
    Operation(
        "detokenize",
        "/detokenize",
        "The text of token ids.",
        {200: shapes.Text},
        tag="tokens",
        body=DetokenizeRequest,
    ),
    Operation(
        "key",
        "/key",
        "The key that asks, its limits, and what is left of its account's credit.",
        {200: KeyDescription},
        (*_OF_KEYS, 404),
        ("GET",),
        "account",
    ),
    Operation(
        "usage",
        "/usage",
        "What the key that asks has used.",
        {200: UsageList},
        (*_OF_KEYS, 400, 404),
        ("GET",),
        "account",
        query={
            "by": {"type": "string", "pattern": f"^({_BY})(,({_BY}))*$", "default": "day"},
            "model": {"type": "string", "maxLength": 256},
            "from": {"type": "string", "format": "date"},
            "to": {"type": "string", "format": "date"},
            "format": {"enum": ["json", "csv"], "default": "json"},
        },
    ),
)


WITHOUT_PREFIX = (
    Operation(
        "live",
        "/health/live",
        "Whether the process answers.",
        {200: shapes.Health},
        (500,),
        ("GET", "HEAD"),
        "health",
        security=(),
    ),
    Operation(
        "ready",
        "/health/ready",
        "Whether a request would be served.",
        {200: shapes.Health, 503: shapes.Health},
        (500,),
        ("GET", "HEAD"),
        "health",
        security=(),
    ),
    Operation(
        "openapi",
        "/openapi.json",
        "This document.",
        {200: shapes.ApiDescription},
        _OF_KEYS,
        ("GET",),
        "openapi",
    ),
)
