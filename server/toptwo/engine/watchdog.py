"""Notices an engine that is alive and makes no progress any more.

Knows the client, process ids and what Linux tells about a process; must not know what the engine computes.

The engine's loop answers greetings between two steps, and a step may take long: a large model on few cores
computes for minutes. So silence alone proves little. An engine that is silent and does nothing either (it was
stopped, or waits for what never comes) is found out soon; one that is silent and busy, only after longer than
any step should take.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from toptwo.engine.client import EngineClient


@dataclass(frozen=True)
class HangPolicy:
    """When to give an engine up.

    still_seconds: how long it may be silent without using a hundredth of a core.
    step_seconds: how long it may be silent at all; `times_longest` times its longest silence so far if that
        is more.
    tick_seconds: between two looks.
    """

    still_seconds: float = 10.0
    step_seconds: float = 600.0
    times_longest: float = 20.0
    tick_seconds: float = 1.0


WATCHFUL = HangPolicy()


async def wait_until_hung(client: EngineClient, pid: int, policy: HangPolicy = WATCHFUL) -> str:
    """Return why the engine that is ready, or will be, is given up; cancel it when the engine has ended.

    Time is counted in looks, so that what passes while this process itself is stopped is not held against the
    engine.
    """
    await client.ready.wait()
    heard, silence, longest = -1, 0.0, 0.0
    efforts: deque[int | None] = deque(maxlen=1 + round(policy.still_seconds / policy.tick_seconds))
    while True:
        if client.num_received != heard:
            heard, silence, longest = client.num_received, 0.0, max(longest, silence)
            efforts.clear()
            await client.greet()
        efforts.append(effort_of(pid))
        if len(efforts) == efforts.maxlen and _is_still(efforts[0], efforts[-1], policy.still_seconds):
            return f"it has neither answered nor computed for {policy.still_seconds:g} s"
        if silence >= max(policy.step_seconds, policy.times_longest * longest):
            return f"it has not answered for {silence:g} s"
        await asyncio.sleep(policy.tick_seconds)
        silence += policy.tick_seconds


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
