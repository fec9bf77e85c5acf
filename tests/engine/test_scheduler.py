"""The scheduler against a runner that checks every block it is handed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_runner import VOCAB, CheckingRunner, generate
from fakes import engine_info
from toptwo.engine.blocks import BlockPool
from toptwo.engine.engine import Engine
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import (
    GenerateRequest,
    Grammar,
    SamplingParams,
    StepResult,
    TokenEvent,
    TokenEvents,
)

BLOCK = 4


@dataclass
class Harness:
    """A scheduler, a checking runner, and everything the scheduler has said."""

    num_blocks: int = 32
    max_model_len: int = 64
    max_num_seqs: int = 4
    max_step_tokens: int = 8
    prefix_caching: bool = True
    prepare: Callable[[Grammar], bool] = lambda grammar: True
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, TokenEvent] = field(default_factory=dict)
    requests: dict[str, GenerateRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = SchedulerLimits(
            VOCAB, self.max_model_len, self.max_num_seqs, self.max_step_tokens, self.prefix_caching
        )
        self.scheduler = Scheduler(limits, BlockPool(self.num_blocks, BLOCK), prepare=self.prepare)
        self.runner = CheckingRunner(self.max_num_seqs, self.num_blocks, BLOCK, self.max_step_tokens)

    def add(self, prompt: list[int], max_tokens: int = 5, scope: str = "", stop: tuple[int, ...] = ()) -> str:
        request_id = f"r{len(self.requests)}"
        request = GenerateRequest(request_id, prompt, SamplingParams(seed=0), max_tokens, list(stop), scope)
        self.requests[request_id] = request
        self.take(self.scheduler.add(request))
        return request_id

    def abort(self, request_id: str) -> None:
        self.take(self.scheduler.abort(request_id))

    def take(self, *events: TokenEvent | None) -> None:
        for event in events:
            if event is None:
                continue
            assert event.request_id not in self.ends, "an event after the terminal one"
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason:
                self.ends[event.request_id] = event

    def step(self) -> bool:
        oldest = self.scheduler._running[:1]
        plan = self.scheduler.plan()
        assert self.scheduler._running[:1] == oldest or not oldest, "the oldest was preempted"
        if plan is None:
            return False
        self.take(*self.scheduler.apply(self.runner.execute(plan)))
        return True

    def run(self, limit: int = 10_000) -> None:
        while self.scheduler.has_work:
            assert self.step(), "work is left but nothing is planned"
            limit -= 1
            assert limit, "no progress"

    def check_clean(self) -> None:
        """Every request has ended once, with the right tokens, and holds nothing."""
        assert set(self.ends) == set(self.requests)
        assert self.scheduler.blocks.num_free == self.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for request_id, request in self.requests.items():
            expected = generate(request.prompt_ids, request.max_tokens, request.stop_token_ids)
            end, got = self.ends[request_id], self.tokens[request_id]
            if end.finish_reason in ("stop", "length"):
                assert got == expected
                assert end.finish_reason == ("stop" if got[-1] in request.stop_token_ids else "length")
            else:
                assert got == expected[: len(got)]


def test_one_request_gets_its_tokens() -> None:
    harness = Harness()
    request_id = harness.add([1, 2, 3], max_tokens=7)
    harness.run()
    assert harness.tokens[request_id] == generate([1, 2, 3], 7)
    harness.check_clean()


def test_a_stop_token_ends_the_sequence_and_is_reported() -> None:
    harness = Harness()
    stop = generate([5], 4)[3]
    request_id = harness.add([5], max_tokens=50, stop=(stop,))
    harness.run()
    assert harness.ends[request_id].finish_reason == "stop"
    assert harness.tokens[request_id][-1] == stop
    harness.check_clean()


def test_a_long_prompt_runs_in_chunks_beside_decoding_sequences() -> None:
    harness = Harness(max_step_tokens=8)
    short = harness.add([1], max_tokens=20)
    harness.step()
    harness.add(list(range(40)), max_tokens=2)
    before = len(harness.tokens[short])
    for _ in range(4):
        harness.step()
    assert len(harness.tokens[short]) == before + 4  # never starved by the prompt
    harness.run()
    harness.check_clean()


def test_a_repeated_prompt_reuses_its_blocks() -> None:
    harness = Harness()
    prompt = list(range(10, 31))
    harness.add(prompt)
    harness.run()
    again = harness.add(prompt)
    harness.run()
    assert harness.ends[again].num_cached_tokens == 20  # 5 full blocks; the last token is computed
    harness.check_clean()


def test_a_prompt_of_whole_blocks_still_computes_its_last_token() -> None:
    harness = Harness()
    prompt = list(range(16))
    harness.add(prompt)
    harness.run()
    again = harness.add(prompt)
    harness.run()
    assert harness.ends[again].num_cached_tokens == 12
    harness.check_clean()


def test_generated_tokens_are_reused_as_the_prefix_of_the_next_turn() -> None:
    harness = Harness()
    first = harness.add([1, 2, 3, 4], max_tokens=9)
    harness.run()
    turn = [1, 2, 3, 4, *harness.tokens[first], 7, 7, 7]
    second = harness.add(turn)
    harness.run()
    assert harness.ends[second].num_cached_tokens == 12
    harness.check_clean()


def test_scopes_do_not_share_blocks() -> None:
    harness = Harness()
    prompt = list(range(20))
    harness.add(prompt, scope="one")
    harness.run()
    other = harness.add(prompt, scope="two")
    harness.run()
    assert harness.ends[other].num_cached_tokens == 0


def test_prefix_caching_can_be_turned_off() -> None:
    harness = Harness(prefix_caching=False)
    prompt = list(range(20))
    harness.add(prompt)
    harness.run()
    again = harness.add(prompt)
    harness.run()
    assert harness.ends[again].num_cached_tokens == 0


def test_preemption_is_invisible_in_the_output() -> None:
    harness = Harness(num_blocks=16, max_model_len=40, max_num_seqs=4, prefix_caching=False)
    for start in range(6):
        harness.add([start, 1, 2], max_tokens=30)
    harness.run()
    assert harness.scheduler.num_preemptions > 0
    harness.check_clean()


def test_requests_finish_in_order_of_arrival_when_equal() -> None:
    harness = Harness(num_blocks=8, max_model_len=32, max_num_seqs=2)
    for start in range(8):
        harness.add([start, 3, 3, 3], max_tokens=12)
    harness.run()
    assert list(harness.ends) == list(harness.requests)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "no tokens"),
        ([1, VOCAB], 5, "outside the model's vocabulary"),
        ([-1], 5, "outside the model's vocabulary"),
        ([1], 0, "at least 1"),
        ([1] * 60, 5, "over the context of 64"),
    ],
)
def test_what_cannot_run_is_refused_with_a_terminal_event(
    prompt: list[int], max_tokens: int, words: str
) -> None:
    harness = Harness()
    refused = harness.add(prompt, max_tokens)
    assert harness.ends[refused].finish_reason == "error"
    assert words in (harness.ends[refused].error or "")
    assert not harness.scheduler.has_work


def test_a_request_id_in_use_is_refused() -> None:
    harness = Harness()
    harness.add([1])
    event = harness.scheduler.add(harness.requests["r0"])
    assert event is not None
    assert event.finish_reason == "error"


def test_unknown_and_repeated_aborts_are_ignored() -> None:
    harness = Harness()
    request_id = harness.add([1, 2, 3])
    harness.step()
    assert harness.scheduler.abort("nobody") is None
    assert harness.scheduler.abort(request_id) is not None
    assert harness.scheduler.abort(request_id) is None
    assert harness.scheduler.blocks.num_free == harness.num_blocks


def test_an_abort_while_a_step_runs_drops_only_that_result() -> None:
    harness = Harness()
    gone, stays = harness.add([1, 2]), harness.add([3, 4])
    plan = harness.scheduler.plan()
    assert plan is not None
    result = harness.runner.execute(plan)
    harness.abort(gone)
    harness.take(*harness.scheduler.apply(result))
    harness.run()
    assert harness.tokens[gone] == []
    assert harness.tokens[stays] == generate([3, 4], 5)
    harness.check_clean()


def test_fail_all_ends_everything_with_the_error() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add([1])
    harness.add([2])
    harness.step()
    harness.take(*harness.scheduler.fail_all("gone"))
    assert {event.error for event in harness.ends.values()} == {"gone"}
    harness.check_clean()


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold one sequence"):
        Harness(num_blocks=3, max_model_len=64)


# A few tokens only, so that prompts often share prefixes.
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=30)
actions = st.one_of(
    st.tuples(st.just("add"), prompts, st.integers(1, 20), st.sampled_from(["", "b"]), st.integers(0, VOCAB)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(actions, max_size=40),
    st.integers(13, 24),
    st.integers(1, 5),
    st.integers(5, 40),
    st.booleans(),
)
def test_nothing_leaks_starves_or_ends_twice(
    script: list[tuple[object, ...]], num_blocks: int, max_num_seqs: int, budget: int, caching: bool
) -> None:
    harness = Harness(num_blocks, 50, max_num_seqs, budget, caching)
    for action in script:
        match action:
            case ("add", list(prompt), int(max_tokens), str(scope), int(stop)):
                harness.add(prompt, max_tokens, scope, (stop,))
            case ("abort", int(index)):
                harness.abort(f"r{index}")
            case ("step", int(count)):
                for _ in range(count):
                    harness.step()
    harness.run(limit=5_000)
    harness.check_clean()


def test_who_waits_too_long_is_told_and_costs_nothing() -> None:
    now = 0.0
    limits = SchedulerLimits(VOCAB, 64, 1, 8, max_queue_seconds=5)
    scheduler = Scheduler(limits, BlockPool(32, BLOCK), lambda: now)
    for name in ("runs", "late", "in time"):
        now += 1
        assert scheduler.add(GenerateRequest(name, [1, 2], SamplingParams(0), 9)) is None
    plan = scheduler.plan()
    assert plan is not None
    now = 7.0  # the first one has been begun; the second has waited for five seconds
    assert [(e.request_id, e.finish_reason, e.token_ids) for e in scheduler.expire()] == [
        ("late", "overload", [])
    ]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    now = 8.0
    assert [event.request_id for event in scheduler.expire()] == ["in time"]


def test_who_was_begun_is_never_late() -> None:
    now = 0.0
    limits = SchedulerLimits(VOCAB, 40, 2, 8, max_queue_seconds=5)
    scheduler = Scheduler(limits, BlockPool(10, BLOCK), lambda: now)
    for name in ("old", "young"):
        scheduler.add(GenerateRequest(name, [1, 2, 3], SamplingParams(0), 30))
    runner = CheckingRunner(2, 10, BLOCK, 8)
    while not scheduler.num_preemptions:
        plan = scheduler.plan()
        assert plan is not None
        scheduler.apply(runner.execute(plan))
    now = 100.0
    scheduler.add(GenerateRequest("new", [1], SamplingParams(0), 3))
    now = 200.0
    assert [event.request_id for event in scheduler.expire()] == ["new"]
    assert scheduler.num_waiting == 1


@dataclass
class Post:
    """The engine's end of a socket, without one."""

    inbox: list[tuple[bytes, GenerateRequest]] = field(default_factory=list)
    sent: list[tuple[bytes, TokenEvent]] = field(default_factory=list)

    def receive(self, *, block: bool) -> tuple[bytes, GenerateRequest] | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, client: bytes, message: TokenEvents) -> None:
        self.sent += [(client, event) for event in message.events]


def test_the_engine_tells_each_client_whose_request_was_late() -> None:
    now, post = 0.0, Post()
    limits = SchedulerLimits(VOCAB, 64, 1, 8, max_queue_seconds=5)
    scheduler = Scheduler(limits, BlockPool(32, BLOCK), lambda: now)
    engine = Engine(scheduler, CheckingRunner(1, 32, BLOCK, 8), post, engine_info())  # type: ignore[arg-type]
    for name in ("a", "b", "c"):
        post.inbox.append((name.encode(), GenerateRequest(name, [1, 2], SamplingParams(0), 4)))
    engine.receive(block=False)
    engine.step()
    now = 6.0
    while scheduler.has_work:
        engine.step()
    ends = {client: event.finish_reason for client, event in post.sent if event.finish_reason}
    assert ends == {b"a": "length", b"b": "overload", b"c": "overload"}


def with_grammar(name: str) -> GenerateRequest:
    return GenerateRequest(name, [3, 1, 4], SamplingParams(seed=0), 5, grammar=Grammar(name, (1,)))


def test_a_grammar_that_is_not_ready_lets_others_go_first() -> None:
    ready: set[str] = set()
    harness = Harness(max_num_seqs=2, prepare=lambda grammar: grammar.source in ready)
    for name in ("slow", "quick"):
        harness.requests[name] = with_grammar(name)
        harness.take(harness.scheduler.add(harness.requests[name]))
    assert not harness.step(), "neither is ready"
    assert harness.scheduler.num_waiting == 2
    plain = [harness.add([i]) for i in range(4)]
    ready.add("quick")
    while harness.step():
        pass
    assert set(harness.ends) == {"quick", *plain}
    ready.add("slow")
    harness.run()
    harness.check_clean()


def test_what_is_not_ready_can_be_ended() -> None:
    harness = Harness(prepare=lambda grammar: False)
    harness.requests["slow"] = with_grammar("slow")
    harness.take(harness.scheduler.add(harness.requests["slow"]))
    assert not harness.step()
    harness.abort("slow")
    assert harness.ends["slow"].finish_reason == "abort"
    assert not harness.scheduler.has_work


def run_ahead(harness: Harness, steps: int = 10_000) -> None:
    """Steps as on a GPU: each is planned before the result of the one in front of it is known."""
    launched: deque[StepResult] = deque()
    for _ in range(steps):
        plan = harness.scheduler.plan()
        if plan:
            launched.append(harness.runner.execute(plan))
        elif not launched:
            break
        while len(launched) > (1 if plan else 0):
            harness.take(*harness.scheduler.apply(launched.popleft()))


def test_steps_planned_ahead_give_the_same_tokens() -> None:
    harness = Harness(num_blocks=12, max_num_seqs=3, max_model_len=40)
    names = [harness.add([1, 2, 3, index], max_tokens=9, stop=(7,)) for index in range(6)]
    run_ahead(harness)
    for name in names:
        assert harness.tokens[name] == generate(harness.requests[name].prompt_ids, 9, [7])
    assert harness.scheduler.blocks.num_free == 12


def test_nothing_is_planned_behind_a_last_token() -> None:
    """Its row would lie behind the context that the sequence was admitted with."""
    harness = Harness()
    harness.add([1, 2, 3], max_tokens=4)
    run_ahead(harness)
    assert harness.runner.steps == 4


def test_who_needs_its_last_token_waits_for_it() -> None:
    harness = Harness()
    params = SamplingParams(seed=0, presence_penalty=1.0)
    harness.take(harness.scheduler.add(GenerateRequest("p", [1, 2], params, 3)))
    harness.requests["p"] = GenerateRequest("p", [1, 2], params, 3)
    first = harness.scheduler.plan()
    assert first
    assert harness.scheduler.plan() is None
    harness.take(*harness.scheduler.apply(harness.runner.execute(first)))
    run_ahead(harness)
    assert harness.tokens["p"] == generate([1, 2], 3)


def test_blocks_given_up_while_they_are_filled_are_not_offered() -> None:
    harness = Harness()
    name = harness.add(list(range(BLOCK * 2)), max_tokens=3)
    plan = harness.scheduler.plan()
    assert plan
    result = harness.runner.execute(plan)
    harness.scheduler._preempt(harness.scheduler._running[0])
    assert harness.scheduler.plan() is None, "its drawn token is not known yet"
    harness.take(*harness.scheduler.apply(result))
    harness.run()
    assert harness.tokens[name] == generate(harness.requests[name].prompt_ids, 3)
