"""Threads that are shared in turn, and never more of them than were asked for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

import pytest

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat, served_model
from toptwo.api.fair_threads import FairThreads
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import create_app


class Works:
    """Work that lasts until it is let go, and what of it has begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.most_at_once = 0
        self._running = 0
        self._lock = threading.Lock()
        self._go = threading.Semaphore(0)

    def work(self, name: str) -> Callable[[], str]:
        def run() -> str:
            with self._lock:
                self.begun.append(name)
                self._running += 1
                self.most_at_once = max(self.most_at_once, self._running)
            self._go.acquire(timeout=10)
            with self._lock:
                self._running -= 1
            return name

        return run

    def let_go(self, count: int) -> None:
        self._go.release(count)

    async def have_begun(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.begun) < count:
                await asyncio.sleep(0.001)


async def test_callers_take_turns() -> None:
    works, threads = Works(), FairThreads(1)
    asked = [("a", "a0"), ("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b0"), ("b", "b1"), ("c", "c0")]
    tasks = [asyncio.create_task(threads.run(caller, works.work(name))) for caller, name in asked]
    await works.have_begun(1)
    works.let_go(len(asked))
    assert await asyncio.gather(*tasks) == [name for _, name in asked]
    assert works.begun == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


async def test_one_caller_alone_has_all_threads() -> None:
    works, threads = Works(), FairThreads(3)
    tasks = [asyncio.create_task(threads.run("a", works.work(str(i)))) for i in range(9)]
    await works.have_begun(3)
    works.let_go(9)
    await asyncio.gather(*tasks)
    assert works.most_at_once == 3


async def test_who_leaves_gives_up_the_queue_but_not_a_running_thread() -> None:
    works, threads = Works(), FairThreads(2)
    for number in range(20):  # each comes, and leaves whether it was begun or not
        task = asyncio.create_task(threads.run("a", works.work(str(number))))
        await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await works.have_begun(2)
    assert works.begun == ["0", "1"]
    assert not threads._waiting
    stays = asyncio.create_task(threads.run("a", works.work("stays")))
    works.let_go(3)
    assert await asyncio.wait_for(stays, 5) == "stays"
    assert works.begun == ["0", "1", "stays"]
    assert works.most_at_once == 2
    async with asyncio.timeout(5):  # the other thread may end last
        while threads._num_free < 2:
            await asyncio.sleep(0.001)


async def test_a_turn_that_comes_to_one_who_leaves_is_passed_on() -> None:
    works, threads = Works(), FairThreads(1)
    first = asyncio.create_task(threads.run("a", works.work("first")))
    await works.have_begun(1)
    leaving = asyncio.create_task(threads.run("b", works.work("leaving")))
    last = asyncio.create_task(threads.run("c", works.work("last")))
    await asyncio.sleep(0)
    threads._pass_on()  # its turn has come, and it does not know yet
    leaving.cancel()
    works.let_go(2)
    assert await asyncio.gather(first, last) == ["first", "last"]
    assert "leaving" not in works.begun


async def test_errors_come_back() -> None:
    with pytest.raises(ZeroDivisionError):
        await FairThreads(1).run("a", lambda: 1 // 0)


class SlowGrammars(FakeGrammars):
    """Grammars that are judged when somebody lets go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def check(self, grammar: str) -> None:
        super().check(grammar)
        self.let_go.wait(10)


async def test_slow_grammars_hold_up_nobody_elses_requests() -> None:
    grammars, engine = SlowGrammars(), FakeEngine(Script(token_ids=[65]))
    app = create_app(engine, served_model(), grammars, KeyRing.from_keys([KEY, "other"]), Lifecycle())
    slow = []
    for number in range(12):
        body = chat(guided_regex=f"a{{{number}}}")
        call = AsgiCall.post_json("/v1/chat/completions", body, [("authorization", f"Bearer {KEY}")])
        slow.append((call, asyncio.create_task(call.run(app))))
    async with asyncio.timeout(5):
        while not grammars.checked:
            await asyncio.sleep(0.001)
    for key in ("other", KEY):
        call = AsgiCall.post_json("/v1/chat/completions", chat(), [("authorization", f"Bearer {key}")])
        await asyncio.wait_for(call.run(app), 5)
        assert call.status == 200
    assert len(grammars.checked) == 1
    body = chat(guided_regex="b")
    other = AsgiCall.post_json("/v1/chat/completions", body, [("authorization", "Bearer other")])
    waiting = asyncio.create_task(other.run(app))
    await asyncio.sleep(0.02)
    grammars.let_go.set()
    await asyncio.wait_for(asyncio.gather(waiting, *(task for _, task in slow)), 10)
    assert {call.status for call, _ in slow} | {other.status} == {200}
    # One caller's grammar that was being checked, one of its own that was next, and then the other caller's.
    assert [json.loads(one)["grammars"][0]["lark_grammar"] for one in grammars.checked].index(
        "start: /b/"
    ) <= 2
