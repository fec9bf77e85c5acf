"""A checked request as the engine's work: one prompt, one engine request per choice, and the answer's form.

Knows the model's words and the engine's limits; must not know HTTP or how an answer is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toptwo.api.sampling_schema import SamplingFields
from toptwo.errors import ApiError
from toptwo.messages import EngineInfo, GenerateRequest, Grammar, LogprobsWanted, SamplingParams
from toptwo.telemetry.record import RequestRecord
from toptwo.text.harmony import Harmony
from toptwo.text.model import ServedModel
from toptwo.text.parsers import ReasoningFormat
from toptwo.text.tools import ToolFormat

NO_LOGPROBS = LogprobsWanted()
SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of two choices; any odd number would do


@dataclass(frozen=True)
class OutputForm:
    """How generated text becomes an answer.

    tool_format, reasoning: what calls and thoughts look like; None where they are plain text.
    harmony: where the answer is in that format; tool_format and reasoning then say only whether calls and
        thoughts are told apart.
    in_reasoning: whether the prompt ends inside a thought.
    parallel_calls: whether an answer may have more than one call.
    continues: whether the text goes on where the prompt ends, instead of answering it.
    """

    stops: tuple[str, ...] = ()
    tool_format: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    harmony: Harmony | None = None
    in_reasoning: bool = False
    parallel_calls: bool = True
    continues: bool = False


@dataclass(frozen=True)
class GenerationJob:
    """What one answer needs. All requests have the same prompt; there is one per choice.

    grammar_param: the caller's field that their grammar comes from; whether it can be used is still to check.
    record: where it is noted what becomes of it.
    """

    requests: tuple[GenerateRequest, ...]
    form: OutputForm
    grammar_param: str = "response_format"
    record: RequestRecord | None = None


@dataclass(frozen=True)
class JobTicket:
    """Whose job it is: a request id unique in the engine, the scope of cached prompts, the name in logs."""

    request_id: str
    cache_scope: str
    log_name: str = ""


@dataclass(frozen=True)
class Workshop:
    """What turns requests into jobs: the model's words, the engine's context."""

    model: ServedModel
    max_model_len: int


@dataclass(frozen=True)
class Order:
    """What one endpoint asks for, in the engine's terms. grammar: serialised, or None for free text."""

    prompt_ids: Sequence[int]
    max_tokens: int
    num_choices: int
    grammar: str | None = None
    logprobs: LogprobsWanted = NO_LOGPROBS


def make_requests(
    fields: SamplingFields, order: Order, ticket: JobTicket, workshop: Workshop
) -> tuple[GenerateRequest, ...]:
    """One engine request per choice. Raises ApiError (400)."""
    model = workshop.model
    stop_token_ids = [] if fields.ignore_eos else list(model.stop_token_ids)
    stop_token_ids += fields.stop_token_ids or []
    grammar = None if order.grammar is None else Grammar(order.grammar, tuple(model.stop_token_ids))
    prompt_ids = list(order.prompt_ids)  # one list for all choices: prompts can be long
    sampling = _sampling(fields, model)
    return tuple(
        GenerateRequest(
            request_id=ticket.request_id if index == 0 else f"{ticket.request_id}-{index}",
            prompt_ids=prompt_ids,
            sampling=_reseeded(sampling, index),
            max_tokens=order.max_tokens,
            stop_token_ids=stop_token_ids,
            cache_scope=ticket.cache_scope,
            grammar=grammar,
            logprobs=order.logprobs,
            log_name=ticket.log_name,
        )
        for index in range(order.num_choices)
    )


def num_together(job: GenerationJob, info: EngineInfo) -> int:
    """How many of a job's choices find room in the KV cache together at their full length; at least 1.

    Choices share the full blocks of their prompt. The others wait for one of these to end: they would only
    take blocks from one another, and from other callers.
    """
    first = job.requests[0]
    num_prompt = len(first.prompt_ids)
    shares = info.prefix_caching and first.logprobs.prompt is None
    shared = (num_prompt - 1) // info.block_size if shares else 0
    own = -(-(num_prompt + first.max_tokens) // info.block_size) - shared
    return max(1, (info.num_blocks - shared) // own)


def fit(num_prompt: int, most_tokens: int | None, max_model_len: int, *, param: str) -> int:
    """How many tokens may be generated: what the caller allows, by default all that fit.

    Raises ApiError (400, context_length_exceeded) in OpenAI's words, which agents search for.
    """
    wanted = most_tokens or 1
    if num_prompt + wanted <= max_model_len:
        return most_tokens or max_model_len - num_prompt
    if num_prompt > max_model_len:
        raise prompt_too_long(str(num_prompt), max_model_len, param=param)
    rule = (
        f"you requested {num_prompt + wanted} tokens ({num_prompt} in the messages, {wanted} in the"
        " completion). Please reduce the length of the messages or completion."
    )
    raise _over_context(rule, max_model_len, param)


def prompt_too_long(num_tokens: str, max_model_len: int, *, param: str) -> ApiError:
    """The error about a prompt that does not fit by itself. num_tokens: as a number, or "at least" one."""
    rule = f"your messages resulted in {num_tokens} tokens. Please reduce the length of the messages."
    return _over_context(rule, max_model_len, param)


def _over_context(rule: str, max_model_len: int, param: str) -> ApiError:
    message = f"This model's maximum context length is {max_model_len} tokens. However, {rule}"
    return ApiError(message, param=param, code="context_length_exceeded")


def _sampling(fields: SamplingFields, model: ServedModel) -> SamplingParams:
    """The caller's choices; msgspec's defaults are OpenAI's. Raises ApiError (400)."""
    chosen: dict[str, Any] = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": None if fields.top_k is None else max(fields.top_k, 0),
        "min_p": fields.min_p,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "repetition_penalty": fields.repetition_penalty,
        "min_tokens": fields.min_tokens,
        "logit_bias": _bias(fields.logit_bias or {}, model.tokenizer.vocab_size),
    }
    seed = secrets.randbits(64) - 2**63 if fields.seed is None else fields.seed
    return SamplingParams(seed=seed, **{name: value for name, value in chosen.items() if value is not None})


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {int(token): value for token, value in given.items()}
    if any(token >= vocab_size for token in bias):
        message = f"Invalid value for 'logit_bias': the model has {vocab_size} tokens, numbered from 0."
        raise ApiError(message, param="logit_bias", code="invalid_value")
    return bias


def _reseeded(sampling: SamplingParams, index: int) -> SamplingParams:
    """The first choice is the one that a request for a single choice gets."""
    if index == 0:
        return sampling
    seed = (sampling.seed + index * SEED_STEP + 2**63) % 2**64 - 2**63
    return SamplingParams(
        **{name: getattr(sampling, name) for name in sampling.__struct_fields__} | {"seed": seed}
    )
