"""Token ids of texts and conversations, and texts of token ids, without generating anything.

Knows HTTP and who calls, and the words of one model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, TypeVar

import orjson
from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints, model_validator
from starlette.requests import Request
from starlette.responses import Response

from toptwo.api.body import run_while_connected
from toptwo.api.chat_translation import chat_request, prompt_ids_of
from toptwo.api.job import Workshop
from toptwo.api.message_schema import ChatMessage
from toptwo.api.parameters import ParameterTable, any_of
from toptwo.api.sampling_schema import TokenId
from toptwo.api.schemas import MOST_MESSAGES
from toptwo.api.security import Authenticator
from toptwo.api.service import Service, ignored_header
from toptwo.api.strict import StrictModel, contradiction
from toptwo.api.text_completion_schema import MOST_PROMPT_TOKENS
from toptwo.api.tool_schema import ToolParameter
from toptwo.errors import ApiError
from toptwo.text.tokenizer import Tokenizer

Result = TypeVar("Result")
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class TokenizeRequest(StrictModel):
    """The body of POST /tokenize: a prompt as it is, or a conversation as the model's template writes it."""

    table: ClassVar[ParameterTable] = ParameterTable(
        neutral={"add_generation_prompt": any_of(True), "continue_final_message": any_of(False)}
    )

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    tools: Annotated[list[ToolParameter], Field(max_length=128, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = Field(None, description="Whether the tokens' texts are wanted too.")

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("prompt", "Either it or messages is needed, and not both.")
        if self.tools and self.messages is None:
            raise contradiction("tools", "They are only allowed with messages.")
        return self

    def ignored_inside(self) -> list[str]:
        """See StrictModel."""
        # Templates write their own control tokens.
        return ["add_special_tokens"] if self.add_special_tokens and self.messages is not None else []


class DetokenizeRequest(StrictModel):
    """The body of POST /detokenize."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(max_length=MOST_PROMPT_TOKENS, fail_fast=True)


@dataclass(frozen=True)
class TokensEndpoints:
    """The handlers of the routes."""

    service: Service

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or of a conversation."""
        parsed = await self.service.parse(request, TokenizeRequest)
        self._require_model(request, parsed.request.model)
        max_model_len = self.service.require_engine().max_model_len
        workshop = Workshop(self.service.model, max_model_len)
        work = partial(_tokenized, parsed.request, workshop)
        body = await in_text_thread(self.service, request, work)
        return Response(body, media_type="application/json", headers=ignored_header(parsed.ignored))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, that of control tokens included."""
        parsed = await self.service.parse(request, DetokenizeRequest)
        self._require_model(request, parsed.request.model)
        work = partial(_detokenized, parsed.request.tokens, self.service.model.tokenizer)
        body = await in_text_thread(self.service, request, work)
        return Response(body, media_type="application/json", headers=ignored_header(parsed.ignored))

    def _require_model(self, request: Request, name: str | None) -> None:
        if name is not None:
            self.service.require_model(request, name)


def tokens_router(service: Service, authenticate: Authenticator) -> APIRouter:
    """The routes, without a prefix. Every one needs a key."""
    router = APIRouter(dependencies=[Depends(authenticate), Depends(service.enter)], tags=["tokens"])
    endpoints = TokensEndpoints(service)
    router.add_api_route("/tokenize", endpoints.tokenize, methods=["POST"])
    router.add_api_route("/detokenize", endpoints.detokenize, methods=["POST"])
    return router


async def in_text_thread(service: Service, request: Request, work: Callable[[], Result]) -> Result:
    """The result of slow work on texts, awaited while the client stays. Raises ClientDisconnect."""
    return await run_while_connected(request, service.text_threads.run(request.state.key_id, work))


def _tokenized(wanted: TokenizeRequest, workshop: Workshop) -> bytes:
    model = workshop.model
    if wanted.prompt is not None:
        prefix = () if wanted.add_special_tokens is False else model.tokenizer.prefix_ids
        ids = [*prefix, *model.tokenizer.encode([wanted.prompt])]
    else:
        chat = {"model": model.name, "messages": wanted.messages, "tools": wanted.tools}
        ids = prompt_ids_of(chat_request(chat, {}), workshop)
    answer: dict[str, object] = {"count": len(ids), "max_model_len": workshop.max_model_len, "tokens": ids}
    if wanted.return_token_strs:
        answer["token_strs"] = [model.tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
    return orjson.dumps(answer)


def _detokenized(ids: list[int], tokenizer: Tokenizer) -> bytes:
    if ids and max(ids) >= tokenizer.vocab_size:
        message = f"Invalid value for 'tokens': The model has {tokenizer.vocab_size} tokens, numbered from 0."
        raise ApiError(message, param="tokens", code="invalid_value")
    return orjson.dumps({"prompt": tokenizer.decode(ids)})
