"""A few threads for slow work, shared fairly: callers take turns, so that who brings much waits for itself.

Knows callers by their names only; must not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

import anyio

Result = TypeVar("Result")


class FairThreads:
    """Never more than so many threads, also when callers leave: work that has begun keeps its thread."""

    def __init__(self, num_threads: int) -> None:
        self._num_free = num_threads
        self._limiter = anyio.CapacityLimiter(num_threads)
        # Who is next comes first.
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, caller: str, work: Callable[[], Result]) -> Result:
        """The result of `work`, done in a thread when it is the caller's turn. Raises what it raises.

        Who is cancelled while waiting leaves the queue; later, the work goes on and nobody sees its result.
        """
        await self._wait_for_turn(caller)
        task = asyncio.create_task(self._work(work))
        return await asyncio.shield(task)

    async def _work(self, work: Callable[[], Result]) -> Result:
        try:
            # It is cancelled when the event loop ends, and then is not waited for.
            return await anyio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)
        finally:
            self._pass_on()

    async def _wait_for_turn(self, caller: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn came at the same moment
                self._pass_on()
            elif turn in self._waiting.get(caller, ()):
                self._leave(caller, turn)
            raise

    def _leave(self, caller: str, turn: asyncio.Future[None]) -> None:
        self._waiting[caller].remove(turn)
        if not self._waiting[caller]:
            del self._waiting[caller]

    def _pass_on(self) -> None:
        """Give a thread to the next caller, who then is the last in turn."""
        while self._waiting:
            caller, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[caller] = turns
            if not turn.done():  # who waited for it is just leaving
                turn.set_result(None)
                return
        self._num_free += 1
