"""The scheduler as a state machine: requests come, go, are late, are pushed out and are asked for again when
they have long ended, in any order. Nothing raises, no block or slot goes astray, and everything ends once.
"""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fake_runner import VOCAB, CheckingRunner, generate
from toptwo.engine.blocks import BlockPool
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, SamplingParams, StepResult, TokenEvent

BLOCK, MAX_LEN, QUEUE_SECONDS = 4, 40, 10.0

# Few ids and few tokens: old ids come again, also while they are in use, and prompts share prefixes.
names = st.integers(0, 8).map(lambda number: f"r{number}")
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=24)


class Requests(RuleBasedStateMachine):
    """What a scheduler is told, and what it must have said by then."""

    @initialize(
        num_blocks=st.integers(10, 20),
        slots=st.integers(1, 4),
        budget=st.integers(4, 30),
        cache=st.booleans(),
    )
    def start(self, num_blocks: int, slots: int, budget: int, cache: bool) -> None:
        self.now = 0.0
        limits = SchedulerLimits(VOCAB, MAX_LEN, slots, budget, cache, QUEUE_SECONDS)
        self.scheduler = Scheduler(limits, BlockPool(num_blocks, BLOCK), lambda: self.now)
        self.runner = CheckingRunner(slots, num_blocks, BLOCK, budget)
        self.launched: deque[StepResult] = deque()
        self.open: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.arrived: dict[str, float] = {}

    @rule(name=names, prompt=prompts, max_tokens=st.integers(1, 16), scope=st.sampled_from(["", "b"]))
    def add(self, name: str, prompt: list[int], max_tokens: int, scope: str) -> None:
        request = GenerateRequest(name, prompt, SamplingParams(0), max_tokens, [7], scope)
        refusal = self.scheduler.add(request)
        if name in self.open:
            assert refusal is not None
            assert "in use" in str(refusal.error)
            return
        assert refusal is None
        self.open[name], self.tokens[name], self.arrived[name] = request, [], self.now

    @rule(name=names)
    def abort(self, name: str) -> None:
        """Of a request that is there, was there, or never was."""
        event = self.scheduler.abort(name)
        assert (event is not None) == (name in self.open)
        if event:
            self.take(event)
        assert self.scheduler.abort(name) is None

    @rule()
    def step(self) -> None:
        self.run_step([])

    @rule(gone=st.lists(names, max_size=3))
    def step_ahead(self, gone: list[str]) -> None:
        """Planned and run before the result of the step in front of it is known; that comes afterwards."""
        plan = self.scheduler.plan()
        if plan:
            self.launched.append(self.runner.execute(plan))
        for name in gone:
            self.abort(name)
        while len(self.launched) > (1 if plan else 0):
            self.take(*self.scheduler.apply(self.launched.popleft()))

    @rule(gone=st.lists(names, max_size=3))
    def step_that_clients_leave_in(self, gone: list[str]) -> None:
        """Their results come when they have left; one may even have come back under the same id."""
        self.run_step(gone)

    @rule(gone=names, prompt=prompts)
    def step_that_an_id_is_reused_in(self, gone: str, prompt: list[int]) -> None:
        self.catch_up()
        plan = self.scheduler.plan()
        self.abort(gone)
        self.add(gone, prompt, 5, "")
        if plan:
            self.take(*self.scheduler.apply(self.runner.execute(plan)))

    @precondition(lambda self: self.scheduler.num_running > 1)
    @rule()
    def preempt(self) -> None:
        """As when blocks run out: the youngest."""
        before = self.scheduler.num_preemptions
        self.scheduler._preempt(self.scheduler._running[-1])
        assert self.scheduler.num_preemptions == before + 1

    @precondition(lambda self: self.scheduler.num_running > 1)
    @rule(seconds=st.sampled_from([1.0, 25.0]))
    def preempt_and_wait(self, seconds: float) -> None:
        """Who was begun and waits again is never late."""
        self.preempt()
        self.wait(seconds)

    @rule(seconds=st.sampled_from([0.5, 9.5, 10.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        begun = {name for name, s in self.scheduler._sequences.items() if s.num_cached is not None}
        late = {name for name in self.open if self.now - self.arrived[name] >= QUEUE_SECONDS} - begun
        events = self.scheduler.expire()
        assert {event.request_id for event in events} == late
        assert all(event.finish_reason == "overload" and not event.token_ids for event in events)
        self.take(*events)
        assert self.scheduler.expire() == []

    @rule()
    def fail(self) -> None:
        self.take(*self.scheduler.fail_all("lost"))
        assert not self.scheduler.has_work

    def catch_up(self) -> None:
        """Take in what was run ahead."""
        while self.launched:
            self.take(*self.scheduler.apply(self.launched.popleft()))

    def run_step(self, gone: list[str]) -> None:
        self.catch_up()
        plan = self.scheduler.plan()
        if plan is None:
            assert not self.open, "there is work, and nothing is planned"
            return
        result = self.runner.execute(plan)
        for name in gone:
            self.abort(name)
        self.take(*self.scheduler.apply(result))

    def take(self, *events: TokenEvent) -> None:
        for event in events:
            request = self.open[event.request_id]  # nothing comes behind the end
            got = self.tokens[event.request_id]
            got += event.token_ids
            assert got == generate(request.prompt_ids, request.max_tokens, [7])[: len(got)]
            if event.finish_reason in ("stop", "length"):
                assert got == generate(request.prompt_ids, request.max_tokens, [7])
            if event.finish_reason:
                del self.open[event.request_id]

    @invariant()
    def everybody_is_somewhere(self) -> None:
        running, waiting = self.scheduler._running, list(self.scheduler._waiting)
        assert {s.request.request_id for s in [*running, *waiting]} == set(self.open)
        assert len(running) + len(waiting) == len(self.open)
        slots = [s.slot for s in running] + self.scheduler._free_slots
        assert sorted(slots) == list(range(self.scheduler.limits.max_num_seqs))  # type: ignore[type-var]
        assert all(s.slot is None and not s.block_ids and s.num_computed == 0 for s in waiting)
        assert not any(s.num_cached is None for s in running)

    @invariant()
    def every_block_is_counted(self) -> None:
        blocks = self.scheduler.blocks
        held = Counter(block for s in self.scheduler._running for block in s.block_ids)
        assert blocks._references == [held[block] for block in range(blocks.num_blocks)]
        assert set(blocks._free) == {b for b in range(blocks.num_blocks) if not held[b]}
        assert all(blocks._hash_of[block] == key for key, block in blocks._block_of.items())
        for sequence in self.scheduler._running:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            assert sequence.num_computed <= len(sequence.block_ids) * BLOCK

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.run_step([])
        assert not self.open, "not everything ended"
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
