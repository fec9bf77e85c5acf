"""The engine's loop against messages in any order: it never raises, and tells everybody once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from engine.fake_engine import INFO
from fake_runner import VOCAB, CheckingRunner, generate
from toptwo.engine.blocks import BlockPool
from toptwo.engine.engine import Engine
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import (
    AbortRequest,
    ClientMessage,
    EngineInfo,
    EngineMessage,
    GenerateRequest,
    Hello,
    SamplingParams,
    TokenEvents,
)

NUM_BLOCKS, BLOCK = 24, 4


@dataclass
class FakeSocket:
    """Messages that came, and all that was sent to each client."""

    inbox: deque[tuple[bytes, ClientMessage]] = field(default_factory=deque)
    sent: list[tuple[bytes, EngineMessage]] = field(default_factory=list)

    def receive(self, *, block: bool) -> tuple[bytes, ClientMessage] | None:
        return self.inbox.popleft() if self.inbox else None

    def send(self, client: bytes, message: EngineMessage) -> None:
        self.sent.append((client, message))

    def tokens(self, request_id: str) -> list[int]:
        return [t for _, event in self.events() if event.request_id == request_id for t in event.token_ids]

    def events(self) -> list[tuple[bytes, object]]:
        found = [(c, m.events) for c, m in self.sent if isinstance(m, TokenEvents)]
        return [(client, event) for client, events in found for event in events]

    def ends(self) -> list[tuple[bytes, str]]:
        return [(client, event.request_id) for client, event in self.events() if event.finish_reason]


@dataclass
class Loop:
    """An engine with a fake on either side."""

    num_seqs: int = 3

    def __post_init__(self) -> None:
        limits = SchedulerLimits(VOCAB, 40, self.num_seqs, 16)
        self.scheduler = Scheduler(limits, BlockPool(NUM_BLOCKS, BLOCK))
        self.socket = FakeSocket()
        runner = CheckingRunner(self.num_seqs, NUM_BLOCKS, BLOCK, 16)
        self.engine = Engine(self.scheduler, runner, self.socket, INFO)  # type: ignore[arg-type]

    def tell(self, client: bytes, message: ClientMessage) -> None:
        self.socket.inbox.append((client, message))

    def turn(self) -> None:
        self.engine.receive(block=False)
        self.engine.step()

    def finish(self) -> None:
        for _ in range(2000):
            self.turn()
            if not self.scheduler.has_work and not self.socket.inbox:
                return
        pytest.fail("the engine does not come to an end")


def request(name: str, prompt: list[int], max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(seed=0), max_tokens)


names = st.integers(0, 9).map(lambda number: f"r{number}")
messages = st.one_of(
    st.builds(request, names, st.lists(st.integers(0, VOCAB), max_size=30), st.integers(0, 20)),
    st.builds(AbortRequest, names),
    st.just(Hello()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([b"a", b"b"]), messages, st.integers(0, 3)), max_size=40))
def test_no_order_of_messages_breaks_the_loop(script: list[tuple[bytes, ClientMessage, int]]) -> None:
    """Ids that are unknown, over, doubled or somebody else's; requests that cannot run."""
    loop = Loop()
    with capture_logs():
        for client, message, turns in script:
            loop.tell(client, message)
            for _ in range(turns):
                loop.turn()
        loop.finish()
    asked = sorted((client, m.request_id) for client, m, _ in script if isinstance(m, GenerateRequest))
    assert sorted(loop.socket.ends()) == asked  # one terminal event for each, refused or not
    answers = [client for client, message in loop.socket.sent if isinstance(message, EngineInfo)]
    assert answers == [client for client, message, _ in script if isinstance(message, Hello)]
    assert loop.scheduler.blocks.num_free == NUM_BLOCKS
    assert loop.engine._origins == {}


def test_a_request_that_cannot_be_taken_in_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    add = loop.scheduler.add

    def add_or_fail(wanted: GenerateRequest) -> object:
        if wanted.request_id == "bad":
            raise TypeError("nobody had thought of that")
        return add(wanted)

    monkeypatch.setattr(loop.scheduler, "add", add_or_fail)
    for name in ("good", "bad", "late"):
        loop.tell(b"a", request(name, [1, 2, 3]))
    with capture_logs() as logs:
        loop.finish()
    assert sorted(name for _, name in loop.socket.ends()) == ["bad", "good", "late"]
    for name in ("good", "late"):
        assert loop.socket.tokens(name) == generate([1, 2, 3], 4)
    (event,) = [event for _, event in loop.socket.events() if event.request_id == "bad"]
    assert event.error == "the engine failed to take in this request"
    assert [line["event"] for line in logs] == ["request failed", "request refused"]


def test_what_goes_wrong_in_a_step_ends_every_request_and_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    for number in range(5):  # more than run at once
        loop.tell(b"a", request(f"r{number}", [number]))
    loop.turn()

    def fail(plan: object) -> object:
        raise MemoryError

    monkeypatch.setattr(loop.engine._runner, "execute", fail)
    with pytest.raises(MemoryError):
        loop.turn()
    assert sorted(loop.socket.ends()) == [(b"a", f"r{number}") for number in range(5)]
