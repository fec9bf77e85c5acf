"""Who runs next, and in which KV blocks: phase-less continuous batching.

A step runs `num_tokens - num_computed` tokens of each chosen sequence under a token budget. Prefill,
chunked prefill, a prefix-cache hit, decoding and resuming after a preemption are all this one rule
(the idea is vLLM V1's). Running sequences go first, oldest first; then the waiting ones, first come
first served. When blocks run out, the youngest running sequence gives up its blocks and waits at the
head of the queue to be recomputed. The oldest one is never preempted, so everything that was begun
finishes. Who has waited too long without having been begun is told so, and nothing is computed for it.

A step may be planned while the one before it still runs: what that computes counts as computed, and a token
that it draws as one to go on from, whose value the runtime knows in time. If it ends its sequence, the row
planned behind it was for nothing, and its result is dropped.
A sequence whose grammar is still being compiled lets others go first.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from toptwo.engine.blocks import BlockPool
from toptwo.engine.request import Sequence
from toptwo.messages import (
    GenerateRequest,
    Grammar,
    NewSequence,
    Row,
    StepPlan,
    StepResult,
    TokenEvent,
    TokenLogprobs,
)


@dataclass(frozen=True)
class SchedulerLimits:
    """max_step_tokens is at least max_num_seqs, so that every running sequence can take a step.

    max_queue_seconds: how long a request may wait to be begun.
    """

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    prefix_caching: bool = True
    max_queue_seconds: float = math.inf


class Scheduler:
    """Turns requests into step plans, and step results into token events.

    clock: seconds that only ever grow.
    prepare: whether a sequence with the grammar can be begun now; asking sees to it that it can be soon.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[Grammar], bool] = lambda grammar: True,
    ) -> None:
        if blocks.num_blocks < blocks.blocks_for(limits.max_model_len):
            raise ValueError("the block pool cannot hold one sequence of max_model_len tokens")
        self.limits = limits
        self.blocks = blocks
        self._clock = clock
        self._prepare = prepare
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_generated_tokens = 0  # of prompts answered, and generated
        self.num_prefix_queries = self.num_prefix_hits = 0  # prompt tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(limits.max_num_seqs))
        self._planned: list[tuple[Sequence, Row]] = []
        self._steps: deque[tuple[int, list[tuple[Sequence, Row]]]] = deque()  # planned, and not answered yet
        self._step = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: GenerateRequest) -> TokenEvent | None:
        """Queue a request, or refuse it with its terminal event."""
        problem = self._problem_of(request)
        if problem:
            return TokenEvent(request.request_id, [], "error", error=problem)
        sequence = Sequence(request, self._clock())
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        return None

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request now and free what it holds. None for an unknown or finished one."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._remove(sequence)
        return TokenEvent(request_id, [], "abort", sequence.num_cached or 0)

    def expire(self) -> list[TokenEvent]:
        """End the requests that have waited too long to be begun. Preempted ones have been."""
        latest = self._clock() - self.limits.max_queue_seconds
        expired = []
        for sequence in self._waiting:  # first come, first served: behind one in time all are
            if sequence.num_cached is None and sequence.arrived > latest:
                break
            if sequence.num_cached is None:
                expired.append(sequence)
        for sequence in expired:
            self._remove(sequence)
        return [TokenEvent(sequence.request.request_id, [], "overload") for sequence in expired]

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End every request with an error."""
        return [self._fail(sequence, error) for sequence in list(self._sequences.values())]

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to run. Answer it with `apply`, in the order of plans.

        Asked for again before that, it plans what can run behind the step whose result is not known yet.
        """
        self._planned = []
        preemptions = self.num_preemptions
        budget = self._plan_running(self.limits.max_step_tokens)
        admitted = []
        if preemptions == self.num_preemptions:  # who gave up blocks must not get them back at once
            admitted = self._plan_waiting(budget)
        if not self._planned:
            return None
        self._step += 1
        self._steps.append((self._step, self._planned))
        return StepPlan(self._step, admitted, [row for _, row in self._planned])

    def apply(self, result: StepResult) -> list[TokenEvent]:
        """Take in the tokens of the oldest step without a result; one event per row that sampled."""
        step, planned = self._steps.popleft()
        if result.step != step:
            raise ValueError(f"the result of step {result.step} came for step {step}")
        events = []
        for index, ((sequence, row), token) in enumerate(zip(planned, result.token_ids, strict=True)):
            if self._sequences.get(sequence.request.request_id) is not sequence:
                continue  # it ended while the step ran
            if row.sample and token < 0:
                # Before its blocks are registered: nobody else is to inherit this KV.
                events.append(self._fail(sequence, "the model gave no valid next token"))
                continue
            self._register_blocks(sequence, row)
            # A preempted prompt is scored anew: what is known already is skipped.
            sequence.scores += result.scores.get(index, [])[max(0, len(sequence.scores) - row.start) :]
            if row.sample:
                sequence.num_pending -= 1
                sequence.token_ids.append(token)
                logprobs = [result.logprobs[index]] if index in result.logprobs else []
                events.append(self._conclude(sequence, token, logprobs))
        return events

    def _problem_of(self, request: GenerateRequest) -> str | None:
        if request.request_id in self._sequences:
            return f"request id {request.request_id} is in use"
        if not request.prompt_ids:
            return "the prompt has no tokens"
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self.limits.vocab_size:
            return f"the prompt has a token outside the model's vocabulary of {self.limits.vocab_size}"
        if any(not 0 <= token < self.limits.vocab_size for token in request.sampling.logit_bias):
            return f"logit_bias has a token outside the model's vocabulary of {self.limits.vocab_size}"
        if request.max_tokens < 1:
            return "max_tokens must be at least 1"
        if len(request.prompt_ids) + request.max_tokens > self.limits.max_model_len:
            return (
                f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} to generate "
                f"are over the context of {self.limits.max_model_len}"
            )
        return None

    def _plan_running(self, budget: int) -> int:
        """Rows for running sequences; returns what is left of the token budget."""
        position = 0
        while position < len(self._running) and budget > 0:
            sequence = self._running[position]
            if not sequence.can_go_on:
                position += 1
                continue
            count = min(sequence.num_left, budget)
            missing = self.blocks.blocks_for(sequence.num_computed + count) - len(sequence.block_ids)
            if missing > self.blocks.num_free:
                # Rows planned so far belong to older sequences, so the victim has none.
                self._preempt(self._running[-1])
                continue
            self._plan_row(sequence, count, self._extend(sequence, missing))
            budget -= count
            position += 1
        return budget

    def _plan_waiting(self, budget: int) -> list[NewSequence]:
        """Admit waiting sequences while slots, blocks and budget last."""
        admitted = []
        for sequence in list(self._waiting):
            if not self._free_slots or budget <= 0:
                break
            grammar = sequence.request.grammar
            is_ready = grammar is None or self._prepare(grammar)
            if sequence.num_pending or not is_ready:  # preempted while it drew a token: that comes first
                continue
            cached = self._find_cached(sequence)
            # All known tokens get their blocks now, so that a prompt, once begun, can finish; and
            # one block per running sequence stays free, or growth would evict the newcomer at once.
            missing = self.blocks.blocks_for(sequence.num_tokens) - len(cached)
            available = self.blocks.num_free - self.blocks.count_free(cached)
            if missing + len(self._running) > available:
                break
            self._waiting.remove(sequence)
            admitted.append(self._admit(sequence, cached))
            count = min(sequence.num_left, budget)
            self._plan_row(sequence, count, self._extend(sequence, missing))
            budget -= count
        return admitted

    def _find_cached(self, sequence: Sequence) -> list[int]:
        if not self.limits.prefix_caching or sequence.request.logprobs.prompt is not None:
            return []
        # The last token is always computed: its logits are what the next token is drawn from.
        count = (sequence.num_tokens - 1) // self.blocks.block_size
        return self.blocks.find_prefix(sequence.block_hashes(count, self.blocks.block_size))

    def _admit(self, sequence: Sequence, cached: list[int]) -> NewSequence:
        self.blocks.share(cached)
        sequence.block_ids = list(cached)
        sequence.num_computed = len(cached) * self.blocks.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            sequence.queue_seconds = self._clock() - sequence.arrived
            if self.limits.prefix_caching:
                self.num_prefix_queries += sequence.num_prompt_tokens
                self.num_prefix_hits += sequence.num_cached
        sequence.slot = self._free_slots.pop()
        self._running.append(sequence)
        return NewSequence(
            slot=sequence.slot,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            sampling=sequence.request.sampling,
            block_ids=cached,
            stop_token_ids=sequence.request.stop_token_ids,
            grammar=sequence.request.grammar,
            logprobs=sequence.request.logprobs,
        )

    def _extend(self, sequence: Sequence, count: int) -> list[int]:
        new_blocks = self.blocks.allocate(count) if count > 0 else []
        sequence.block_ids += new_blocks
        return new_blocks

    def _plan_row(self, sequence: Sequence, count: int, new_blocks: list[int]) -> None:
        assert sequence.slot is not None  # noqa: S101  (running sequences have a slot)
        sample = count == sequence.num_left
        in_prompt = sequence.num_computed < sequence.num_prompt_tokens
        score = in_prompt and sequence.request.logprobs.prompt is not None
        row = Row(sequence.slot, sequence.num_computed, count, new_blocks, sample, score)
        self._planned.append((sequence, row))
        sequence.num_computed += count
        sequence.num_pending += sample

    def _register_blocks(self, sequence: Sequence, row: Row) -> None:
        """Offer the blocks that the row has filled to the prefix cache, unless they were given up since."""
        size = self.blocks.block_size
        filled = range(row.start // size, (row.start + row.num_tokens) // size)
        if not self.limits.prefix_caching or not filled or sequence.slot is None:
            return
        hashes = sequence.block_hashes(filled.stop, size)
        for index in filled:
            self.blocks.register(sequence.block_ids[index], hashes[index])

    def _conclude(self, sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> TokenEvent:
        reason = sequence.finish_reason()
        if reason:
            self._remove(sequence)
        is_first = sequence.num_generated == 1
        self.num_generated_tokens += 1
        if is_first:
            self.num_prompt_tokens += sequence.num_prompt_tokens
        return TokenEvent(
            sequence.request.request_id,
            [token],
            reason,
            sequence.num_cached or 0,
            logprobs=logprobs,
            prompt_logprobs=sequence.scores if is_first else [],
            queue_seconds=sequence.queue_seconds if is_first else None,
        )

    def _fail(self, sequence: Sequence, error: str) -> TokenEvent:
        self._remove(sequence)
        return TokenEvent(sequence.request.request_id, [], "error", sequence.num_cached or 0, error)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._stop_running(sequence)
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._stop_running(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        assert sequence.slot is not None  # noqa: S101
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        self.blocks.release(sequence.block_ids)
        sequence.block_ids = []
