"""Notices an engine that is alive and makes no progress any more.

Knows the client, process ids and what Linux tells about a process; must not know what the engine computes.

The engine's loop answers greetings between two steps, and a step may take long: a large model on few cores
computes for minutes. So silence alone proves little. An engine that is silent and does nothing either (it was
stopped, or waits for what never comes) is found out soon; one that is silent and busy, only after longer than
any step should take. One that loads its model answers nothing yet, but notes how far it is, weight by weight,
and is judged by that in the same way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toptwo.engine.client import EngineClient


@dataclass(frozen=True)
class HangPolicy:
    """When to give an engine up.

    still_seconds: how long it may be silent without using a hundredth of a core.
    step_seconds: how long it may be silent at all; `times_longest` times its longest silence so far if that
        is more.
    load_still_seconds: as still_seconds, while it loads: disks, and those behind networks, pause for longer.
    load_seconds: as step_seconds, while it loads: one weight, or the model's first pass.
    tick_seconds: between two looks.
    """

    still_seconds: float = 10.0
    step_seconds: float = 600.0
    load_still_seconds: float = 120.0
    load_seconds: float = 1800.0
    times_longest: float = 20.0
    tick_seconds: float = 1.0


WATCHFUL = HangPolicy()


class Patience:
    """How long an engine has shown nothing, counted in looks, so that what passes while this process itself
    is stopped is not held against the engine."""

    def __init__(self, pid: int, policy: HangPolicy, still_seconds: float, silent_seconds: float) -> None:
        self._pid = pid
        self._policy = policy
        self._still_seconds = still_seconds
        self._silent_seconds = silent_seconds
        self._shown: object = None
        self._silence = self._longest = 0.0
        self._efforts: deque[int | None] = deque(maxlen=1 + round(still_seconds / policy.tick_seconds))

    def look(self, shown: object) -> bool:
        """Take in what the engine shows now, a tick after the last look. Whether that is news."""
        self._silence += self._policy.tick_seconds
        is_new = shown != self._shown
        if is_new:
            self._shown, self._silence, self._longest = shown, 0.0, max(self._longest, self._silence)
            self._efforts.clear()
        self._efforts.append(effort_of(self._pid))
        return is_new

    def verdict(self) -> str | None:
        """Why the engine is given up, if it is."""
        efforts = self._efforts
        if len(efforts) == efforts.maxlen and _is_still(efforts[0], efforts[-1], self._still_seconds):
            return f"has neither answered nor computed for {self._still_seconds:g} s"
        if self._silence >= max(self._silent_seconds, self._policy.times_longest * self._longest):
            return f"has not answered for {self._silence:g} s"
        return None


async def wait_until_hung(
    client: EngineClient, pid: int, progress: Callable[[], object], policy: HangPolicy = WATCHFUL
) -> str:
    """Return why the engine is given up; cancel it when the engine has ended.

    progress: how far the engine is with loading; anything that changes as it goes on.
    """
    loading = Patience(pid, policy, policy.load_still_seconds, policy.load_seconds)
    while not client.ready.is_set():
        loading.look(progress())
        if reason := loading.verdict():
            return f"it {reason} while it loaded"
        await asyncio.sleep(policy.tick_seconds)
    serving = Patience(pid, policy, policy.still_seconds, policy.step_seconds)
    while True:
        if serving.look(client.num_received):
            await client.greet()
        if reason := serving.verdict():
            return f"it {reason}"
        await asyncio.sleep(policy.tick_seconds)


def effort_of(pid: int) -> int | None:
    """Hundredths of a second that the process has computed, plus the pages it has waited for.

    None where the system does not tell: on anything but Linux, and of a process that is gone.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # from the third on, as proc(5) counts them
    major_faults, user_ticks, system_ticks = (int(fields[at - 3]) for at in (12, 14, 15))
    return major_faults + user_ticks + system_ticks


def _is_still(before: int | None, now: int | None, seconds: float) -> bool:
    return before is not None and now is not None and now - before < seconds
