"""The plain data that crosses the waists of the server.

Waist 1 (API process <-> engine process): `ClientMessage` one way, `EngineMessage` the other.
Waist 2 (engine <-> runtime, and later rank 0 <-> ranks): `StepPlan` one way, `StepResult` back.

Everything here is msgspec structs of ints, floats, strings and lists, so that any of it can travel
as MessagePack bytes. This module imports no sibling, no torch and no fastapi.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error", "overload"]


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token of one request is chosen.

    The order of application is: logit_bias and min_tokens, penalties, grammar, temperature, top_k, top_p,
    min_p, draw.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, from the logits of
        tokens that were already *generated* (OpenAI's semantics; the prompt does not count).
    repetition_penalty: CTRL's divisive penalty (arXiv 1909.05858) on tokens of prompt and output; 1 is off.
    seed: draws use the counter-based stream (seed, position), so they depend on nothing else.
    logit_bias: added to the logits of these token ids.
    min_tokens: tokens that end the sequence cannot be chosen before so many were generated.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0


class Grammar(msgspec.Struct, frozen=True):
    """What the output must match: a serialised llguidance grammar that was checked before it is sent.

    end_token_ids: tokens that end an output which matches.
    """

    source: str
    end_token_ids: tuple[int, ...]


class LogprobsWanted(msgspec.Struct, frozen=True):
    """How many of the likeliest tokens are reported at each position, beside the one that is there.

    output, prompt: of generated tokens, and of the prompt's from the second on; None for no report.
    """

    output: int | None = None
    prompt: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the model's own probabilities at one position: before bias, penalties,
    grammar and temperature.

    logprob: of the token that is there. top_ids, top_logprobs: the likeliest tokens, best first.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    25,
    50,
    100,
    250,
    500,
    1000,
)
"""Bounds for whatever is measured in seconds."""


# --- Waist 1: API process -> engine process -------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, tag="generate"):
    """One sequence to generate. It is answered by `TokenEvent`s, the last of which is terminal.

    max_tokens: most tokens to generate; prompt and output together must fit in max_model_len.
    stop_token_ids: tokens that end the sequence with finish_reason "stop" (eos and its like).
    cache_scope: prefix-cache blocks are shared only between requests of the same scope.
    grammar: what the generated text must match; tokens that break it are never chosen.
    log_name: what the logs call the HTTP request that it belongs to.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: list[int] = []
    cache_scope: str = ""
    grammar: Grammar | None = None
    logprobs: LogprobsWanted = LogprobsWanted()
    log_name: str = ""


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request and free what it holds. Unknown or finished ids are ignored."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A client's first message; the engine answers with `EngineInfo` once it can serve.

    It may be sent again at any time: the answer then shows that the engine's loop still turns.
    """


class StatsRequest(msgspec.Struct, frozen=True, tag="stats?"):
    """Asks for `EngineStats`, which come between two steps."""


ClientMessage = GenerateRequest | AbortRequest | Hello | StatsRequest


# --- Waist 1: engine process -> API process -------------------------------------------------------


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request and, in its last event, why it ended.

    token_ids: newly generated ids, the stop token included; may be empty in a terminal event.
    num_cached_tokens: prompt tokens whose KV came from the prefix cache.
    finish_reason: "overload" is that of a request which waited too long, and was not begun.
    error: a sentence for the client, only with finish_reason "error".
    logprobs: one per token id, if they were asked for.
    prompt_logprobs: in the first event with tokens, one per prompt token from the second on, likewise.
    queue_seconds: in the same event, how long the request waited for its first step.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    queue_seconds: float | None = None


class TokenEvents(msgspec.Struct, frozen=True, tag="tokens"):
    """All events of one engine step for one client, in one message."""

    events: list[TokenEvent]


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """What the engine resolved its `auto` settings to. Sizes in bytes.

    weights_id: changes when any number of the packed weights does.
    """

    architecture: str
    device: str
    dtype: str
    kv_dtype: str
    quantization: str
    backend: str
    num_threads: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    block_size: int
    num_blocks: int
    prefix_caching: bool
    num_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    load_seconds: float
    weights_id: str = ""


class Histogram(msgspec.Struct):
    """How often something measured fell between bounds.

    bounds: ascending. counts: one more than bounds; counts[i] is of what is above bounds[i - 1] and at most
    bounds[i]. total: the sum of all that was measured.
    """

    bounds: list[float]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def over(cls, bounds: Sequence[float]) -> Histogram:
        """An empty one."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class EngineStats(msgspec.Struct, frozen=True, tag="stats"):
    """What the engine does now, and has done since it started.

    prompt_tokens: of prompts that were begun to be answered, cached ones included.
    prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
    step_seconds: how long steps took.
    expert_tokens: by layer, how many tokens came to each expert.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    step_seconds: Histogram
    expert_tokens: dict[int, list[int]]


EngineMessage = TokenEvents | EngineInfo | EngineStats


# --- Waist 2: engine <-> runtime ------------------------------------------------------------------


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that takes a slot before the step runs; also one resumed after preemption.

    token_ids: all tokens known so far (prompt, and what was generated before a preemption).
    num_prompt_tokens: how many of them the caller wrote; penalties count the rest.
    block_ids: KV blocks already filled by the prefix cache.
    stop_token_ids, grammar, logprobs: as in GenerateRequest.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_ids: list[int]
    stop_token_ids: list[int] = []
    grammar: Grammar | None = None
    logprobs: LogprobsWanted = LogprobsWanted()


class Row(msgspec.Struct, frozen=True):
    """Compute the tokens [start, start + num_tokens) of the sequence in `slot`.

    new_block_ids: KV blocks appended to the slot's block table before the step.
    sample: whether a next token is drawn after the row's last position.
    score: whether the prompt's tokens behind each of the row's positions are to be judged.
    """

    slot: int
    start: int
    num_tokens: int
    new_block_ids: list[int]
    sample: bool
    score: bool = False


class StepPlan(msgspec.Struct, frozen=True):
    """One step of the model. It never needs the value of a token just sampled: the runtime keeps
    the token table of every slot, so a plan can be made while the step before it still runs."""

    step: int
    admitted: list[NewSequence]
    rows: list[Row]


class StepResult(msgspec.Struct, frozen=True):
    """Sampled token ids, one per row of the plan; -1 where the row did not sample, or could not,
    because its logits are not numbers or its grammar allows no token.

    logprobs: by row index, of the sampled token, where the sequence wants them.
    scores: by row index, of the prompt tokens start + 1 ... of a row that scores.
    """

    step: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    scores: dict[int, list[TokenLogprobs]] = {}
