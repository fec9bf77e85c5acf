"""Requests served by a scheduler and a runner in one process, with the logits each token was drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fault_switch import injected_faults
from tiny import load_runner
from toptwo.engine.blocks import BlockPool
from toptwo.engine.request import Sequence
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, SamplingParams, TokenLogprobs

MAX_LEN, VOCAB, SLOTS = 256, 320, 32


@dataclass
class Run:
    """What a set of requests got: tokens, and the logits each token was drawn from."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    num_preemptions: int = 0
    largest_batch: int = 0


def run(
    directory: Path,
    *waves: list[GenerateRequest],
    num_blocks: int = 512,
    max_step_tokens: int = 512,
    prefix_caching: bool = True,
    preempt_every: int = 0,
    **options: Any,
) -> Run:
    """Serve waves of requests one after the other on one engine. options: those of `tiny.load_runner`.

    preempt_every: force a preemption before every so many steps.
    """
    runner = load_runner(directory, max_model_len=MAX_LEN, num_blocks=num_blocks, **options)
    limits = SchedulerLimits(VOCAB, MAX_LEN, SLOTS, max_step_tokens, prefix_caching)
    scheduler = Scheduler(limits, BlockPool(num_blocks, 16))
    recorded: list[list[torch.Tensor]] = []
    compute = runner.compute_logits

    def record(plan: object) -> object:
        logits, batch = compute(plan)
        recorded.append([logits[s.last].clone() for s in batch.selections if s.row.sample])
        return logits, batch

    runner.compute_logits = record
    result = Run()
    preempt = scheduler._preempt

    def record_preemption(sequence: Sequence) -> None:
        if sequence.num_generated:
            result.preempted.add(sequence.request.request_id)
        preempt(sequence)

    scheduler._preempt = record_preemption  # type: ignore[method-assign]
    if preempt_every:
        injected_faults.preempt_every(scheduler, preempt_every)
    for wave in waves:
        for each in wave:
            assert scheduler.add(each) is None
        while plan := scheduler.plan():
            events = scheduler.apply(runner.execute(plan))
            result.largest_batch = max(result.largest_batch, len(events))
            for event, logits in zip(events, recorded.pop(), strict=True):
                result.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                result.logits.setdefault(event.request_id, []).append(logits)
                result.cached[event.request_id] = event.num_cached_tokens
                result.logprobs.setdefault(event.request_id, []).extend(event.logprobs)
                result.prompt_logprobs.setdefault(event.request_id, []).extend(event.prompt_logprobs)
                if event.finish_reason:
                    result.ends[event.request_id] = event.finish_reason
    result.num_preemptions = scheduler.num_preemptions
    return result


def request(
    name: str, seed: int = 0, length: int = 60, max_tokens: int = 24, **sampling: float
) -> GenerateRequest:
    prompt = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    params = SamplingParams(**{"seed": seed, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerateRequest(name, prompt, params, max_tokens)


def strangers(count: int = 16) -> Iterator[GenerateRequest]:
    for index in range(count):
        length, max_tokens = 5 + 11 * index % 180, 10 + 3 * index % 50
        yield request(f"s{index}", seed=100 + index, length=length, max_tokens=max_tokens)
