"""A text completion request as jobs, one per prompt, and their deltas as one stream.

Knows OpenAI's request and the model's words; must not know HTTP or how an answer is written.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec

from toptwo.api.generation import Delta
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
from toptwo.api.output_grammar import output_grammar
from toptwo.api.text_completion_schema import CompletionRequest
from toptwo.errors import ApiError
from toptwo.messages import LogprobsWanted
from toptwo.text.tokenizer import TooManyTokensError


def completion_job(
    request: CompletionRequest, prompt: str | list[int], ticket: JobTicket, workshop: Workshop
) -> GenerationJob:
    """Tokenise one of the request's prompts. Slow for long ones: call it in a thread.

    Raises ApiError (400) when the prompt is empty or does not fit, or a schema is bad.
    """
    prompt_ids = raw_prompt_ids(prompt, workshop)
    # The engine has nothing to do for 0 tokens; the one that it generates is not shown.
    most_tokens = max(request.most_tokens, 1)
    grammar, param = output_grammar(request, request.response_format)
    ranked = request.num_candidates > request.num_choices
    order = Order(
        prompt_ids=prompt_ids,
        max_tokens=fit(len(prompt_ids), most_tokens, workshop.max_model_len, param="prompt"),
        num_choices=request.num_candidates,
        grammar=grammar,
        logprobs=LogprobsWanted(
            output=0 if ranked and request.logprobs is None else request.logprobs,
            prompt=request.logprobs if request.echo else None,
        ),
    )
    requests = make_requests(request, order, ticket, workshop)
    if request.echo and request.logprobs is not None and most_tokens == 1:
        # Whoever wants to know how likely a text is asks for one token more and counts on a report of
        # it. It is the last one anyway, so it needs not be a stop token, which would not be reported.
        requests = tuple(msgspec.structs.replace(one, stop_token_ids=[]) for one in requests)
    return GenerationJob(requests, OutputForm(stops=request.stops, continues=True), param)


def raw_prompt_ids(prompt: str | list[int], workshop: Workshop) -> list[int]:
    """The token ids of a prompt that is taken as it is: texts of control tokens become control tokens. A
    text begins with the tokens that the tokenizer puts before every text, bos where it has one.

    Raises ApiError (400).
    """
    tokenizer, most = workshop.model.tokenizer, workshop.max_model_len
    try:
        ids = (
            [*tokenizer.prefix_ids, *tokenizer.encode([prompt], most)] if isinstance(prompt, str) else prompt
        )
    except TooManyTokensError:
        raise prompt_too_long(f"at least {most + 1}", most, param="prompt") from None
    if not ids:
        raise _bad_prompt("It has no token.")
    if max(ids) >= tokenizer.vocab_size:
        raise _bad_prompt(f"The model has {tokenizer.vocab_size} tokens, numbered from 0.")
    return ids


async def numbered(
    stream: AsyncGenerator[Delta, None], prompt: int, num_choices: int
) -> AsyncGenerator[Delta, None]:
    """The deltas of one prompt of many; choice j of prompt i gets the index i * num_choices + j."""
    async with aclosing(stream):
        async for delta in stream:
            yield replace(delta, index=prompt * num_choices + delta.index)


def _bad_prompt(rule: str) -> ApiError:
    return ApiError(f"Invalid value for 'prompt': {rule}", param="prompt", code="invalid_value")
