"""Faults, one at a time, drawn at random: each strikes one replica, and leaves both ready when it is over.

Knows processes and lines; must not know what clients see, which is told by the windows that faults leave.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil

from reliability.balanced import Balanced, Replica
from reliability.live import engine_of
from reliability.wire import ask, leave

CRASH_WINDOW = 62.0  # seconds within which a replica that loses three engines gives up
SETTLE_SECONDS = 30.0
CROWD = 200  # streams of an overload: more than both replicas run at once


@dataclass(frozen=True)
class Window:
    """When a fault struck and until when it may be felt, and whom it may harm.

    tells: streams may end with an error event. cuts: they may break off.
    """

    name: str
    begin: float
    end: float
    tells: bool
    cuts: bool


@dataclass
class Chaos:
    """windows: of all faults so far. crowd_statuses: what the requests of overloads were answered with.

    unready_after, back_after: seconds from an engine's death to its replica's 503, and to its next 200.
    """

    both: Balanced
    source: random.Random
    windows: list[Window] = field(default_factory=list)
    unready_after: list[float] = field(default_factory=list)
    back_after: list[float] = field(default_factory=list)
    crowd_statuses: Counter[int] = field(default_factory=Counter)
    _crashes: dict[str, list[float]] = field(default_factory=dict)

    async def run(self, seconds: float) -> None:
        """Faults until so many seconds are over; all of them at least once, if there is time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            names = list(FAULTS)
            self.source.shuffle(names)
            for name in names:
                if time.monotonic() < deadline:
                    await self.strike(name)
                    await asyncio.sleep(self.source.uniform(0.2, 1.5))

    async def strike(self, name: str) -> None:
        """One fault, until all is well again."""
        replica = self.source.choice(self.both.replicas)
        if name in ENGINE_FAULTS and not self._may_crash(replica):
            return
        strike, tells, cuts = FAULTS[name]
        begin = time.monotonic()
        print(f"{name} at {replica.name}", flush=True)
        await strike(self, replica)
        replica.line.calm()
        async with asyncio.timeout(SETTLE_SECONDS + 60):
            while not replica.is_ready:
                assert replica.server.process.poll() is None, replica.server.err[-2000:]
                await asyncio.sleep(0.05)
        await self.both.wait_until_up()
        self.windows.append(Window(name, begin, time.monotonic(), tells, cuts))

    def _may_crash(self, replica: Replica) -> bool:
        now = time.monotonic()
        recent = [at for at in self._crashes.get(replica.name, ()) if now - at < CRASH_WINDOW]
        self._crashes[replica.name] = recent
        if len(recent) >= 2:
            return False
        recent.append(now)
        return True

    async def kill_engine(self, replica: Replica) -> None:
        engine = engine_of(replica.server)
        engine.kill()
        await self._watch_return(replica)

    async def stop_engine(self, replica: Replica) -> None:
        """A hang: it is found out by its replica, not by us."""
        engine = engine_of(replica.server)
        engine.suspend()
        async with asyncio.timeout(SETTLE_SECONDS):
            while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.05)
        await self._watch_return(replica)

    async def _watch_return(self, replica: Replica) -> None:
        began = time.monotonic()
        while replica.server.readiness() != 503:
            assert time.monotonic() - began < SETTLE_SECONDS, "it is ready without an engine"
            await asyncio.sleep(0.01)
        self.unready_after.append(time.monotonic() - began)
        while replica.server.readiness() != 200:
            assert time.monotonic() - began < SETTLE_SECONDS, "the engine does not come back"
            await asyncio.sleep(0.05)
        self.back_after.append(time.monotonic() - began)

    async def kill_api(self, replica: Replica) -> None:
        """The engine must not outlive it."""
        engine = replica.kill()
        gone = time.monotonic() + 5
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < gone, "the engine outlived its parent"
            await asyncio.sleep(0.05)
        replica.start()
        await replica.wait_until_ready()

    async def restart(self, replica: Replica) -> None:
        assert await replica.drain() == 0
        replica.start()
        await replica.wait_until_ready()

    async def stop_api(self, replica: Replica) -> None:
        """The whole replica stands still for a moment."""
        os.kill(replica.server.process.pid, signal.SIGSTOP)
        await asyncio.sleep(1)
        os.kill(replica.server.process.pid, signal.SIGCONT)

    async def overload(self, replica: Replica) -> None:
        target = self.both.target
        requests = [target.post("/chat/completions", target.stream(f"crowd {n}", 16)) for n in range(CROWD)]
        for reply in await asyncio.gather(*(ask(target.port, request) for request in requests)):
            assert reply.status in (200, 503), reply
            assert reply.status == 200 or int(reply.headers["retry-after"]) >= 1
            self.crowd_statuses[reply.status] += 1

    async def disconnect(self, replica: Replica) -> None:
        target, source = self.both.target, self.source
        request = target.post("/chat/completions", target.stream("a long one", 400))
        leaving = (leave(target.port, request, source.uniform(0, 1), reset=n % 2 == 0) for n in range(40))
        await asyncio.gather(*leaving)

    async def delay(self, replica: Replica) -> None:
        replica.line.delay = 0.1
        await asyncio.sleep(2)

    async def throttle(self, replica: Replica) -> None:
        replica.line.rate = 20_000
        await asyncio.sleep(2)

    async def silence(self, replica: Replica) -> None:
        replica.line.silent = True
        await asyncio.sleep(1)

    async def refuse(self, replica: Replica) -> None:
        replica.line.refuse = True
        await asyncio.sleep(2)

    async def reset(self, replica: Replica) -> None:
        replica.line.reset()

    async def cut(self, replica: Replica) -> None:
        replica.line.cut()


Strike = Callable[[Chaos, Replica], Awaitable[None]]

ENGINE_FAULTS = ("SIGKILL of an engine", "SIGSTOP of an engine")
FAULTS: dict[str, tuple[Strike, bool, bool]] = {
    "SIGKILL of an engine": (Chaos.kill_engine, True, False),
    "SIGSTOP of an engine": (Chaos.stop_engine, True, False),
    "SIGKILL of an API process": (Chaos.kill_api, True, True),
    "SIGTERM": (Chaos.restart, False, False),
    "SIGSTOP of an API process": (Chaos.stop_api, False, False),
    "overload": (Chaos.overload, False, False),
    "disconnects": (Chaos.disconnect, False, False),
    "delay": (Chaos.delay, False, False),
    "throttle": (Chaos.throttle, False, False),
    "silence": (Chaos.silence, False, False),
    "refused connections": (Chaos.refuse, False, False),
    "reset connections": (Chaos.reset, False, True),
    "cut connections": (Chaos.cut, False, True),
}
"""By name: what happens, whether streams may be told of it, and whether it may cut them."""
