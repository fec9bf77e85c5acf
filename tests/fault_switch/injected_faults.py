"""Faults at a chosen step of an engine, for tests: FAULTS="raise@7" or "slow@20,kill@9".

`name@number`, comma-separated, each in the first engine of a server only; `name@number*` in every one.

raise@N, oom@N: an exception in the Nth step, the second one a MemoryError.
exit@N, kill@N: the process ends with status 0, or as the kernel ends one when memory is out.
hang@N: the Nth step never ends. slow@MS: every step takes so many milliseconds more.
stall@N: loading never goes on behind the Nth weight.
preempt@N: before every Nth step the youngest running sequence loses its blocks, unless it runs alone.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toptwo.engine import process
from toptwo.engine.engine import Engine
from toptwo.engine.scheduler import Scheduler
from toptwo.messages import StepPlan, StepResult

FIRST_SOCKET = "engine-1.sock"  # what the supervisor calls that of a server's first engine


def parse(text: str, *, first: bool = True) -> dict[str, int]:
    """What is asked of this engine. A fault that does not exist is an error: it would never strike."""
    wanted = {}
    for part in text.split(","):
        found = re.fullmatch(r"(raise|oom|exit|kill|hang|stall|slow|preempt)@([1-9]\d*)(\*?)", part)
        if not found:
            raise ValueError(f"FAULTS: {part!r} is no fault")
        if first or found[3]:
            wanted[found[1]] = int(found[2])
    return wanted


def install(text: str, generation: str) -> None:
    """Let every Engine that is made in this process fail as asked. generation: the path of its socket."""
    faults = parse(text, first=generation.endswith(FIRST_SOCKET))
    if "stall" in faults:
        stall_at(faults["stall"])
    make = Engine.__init__

    def make_faulty(self: Engine, scheduler: Scheduler, runner: Any, *others: Any) -> None:
        if "preempt" in faults:
            preempt_every(scheduler, faults["preempt"])
        make(self, scheduler, FaultyRunner(runner, faults), *others)

    Engine.__init__ = make_faulty  # type: ignore[method-assign]


def stall_at(weight: int) -> None:
    """Let the loading hang when it reports this weight."""
    report = process.report_progress

    def report_or_hang(socket_path: Path, done: int, total: int) -> None:
        report(socket_path, done, total)
        if done == weight:
            strike("hang")

    process.report_progress = report_or_hang


def preempt_every(scheduler: Scheduler, steps: int) -> None:
    """Take the youngest sequence's blocks away before every so many steps.

    Never the only one's: the oldest is never preempted, which is why everything finishes.
    """
    plan, count = scheduler.plan, 0

    def plan_after_preempting() -> StepPlan | None:
        nonlocal count
        count += 1
        if count % steps == 0 and len(scheduler._running) > 1:
            scheduler._preempt(scheduler._running[-1])
        return plan()

    scheduler.plan = plan_after_preempting  # type: ignore[method-assign]


@dataclass
class FaultyRunner:
    """A runner that runs steps until one goes wrong."""

    runner: Any
    faults: dict[str, int]
    steps: int = 0

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.steps += 1
        time.sleep(self.faults.get("slow", 0) / 1000)
        for name, step in self.faults.items():
            if name not in ("slow", "preempt", "stall") and step == self.steps:
                strike(name)
        launched: Callable[[], StepResult] = self.runner.launch(plan)
        return launched

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)


def strike(name: str) -> None:
    """Let the fault happen here and now, and say when that was: the clock is the same in all processes."""
    print(f"injected {name} at {time.monotonic()}", file=sys.stderr, flush=True)
    match name:
        case "raise":
            raise RuntimeError("injected")
        case "oom":
            bytearray(1 << 62)  # more than there is: a MemoryError
        case "exit":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            while True:
                time.sleep(1)
