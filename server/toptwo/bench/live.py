"""What a person sees while a measurement runs: on a terminal a bar per level, elsewhere a line per level.

Knows how far a level has come; must not slow it down, and so draws a few times per second, in the same
thread, from counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from toptwo.bench.client import Outcome
from toptwo.bench.load import Level
from toptwo.bench.summary import percentile

DRAW_SECONDS = 0.25


@dataclass
class Meter:
    """Counters of a level that runs."""

    level: Level
    started: float = field(default_factory=time.perf_counter)
    num_ok: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    ttfts: list[float] = field(default_factory=list)

    def on_token(self) -> None:
        """A chunk of text has come."""
        self.num_tokens += 1

    def on_outcome(self, outcome: Outcome) -> None:
        """A request has ended."""
        if outcome.error is not None:
            self.num_failed += 1
            return
        self.num_ok += 1
        if outcome.ttft is not None:
            self.ttfts.append(outcome.ttft)

    def total(self) -> float:
        """The end of the way: a number of requests, or else of seconds."""
        return self.level.most_requests or self.level.duration or 0.0

    def done(self) -> float:
        """How much of it lies behind."""
        if self.level.most_requests:
            return self.num_ok + self.num_failed
        return min(time.perf_counter() - self.started, self.total())

    def text(self) -> str:
        """The figures so far."""
        rate = self.num_tokens / max(time.perf_counter() - self.started, 1e-9)
        ttft = f", TTFT p50 {1000 * percentile(self.ttfts, 50):,.0f} ms" if self.ttfts else ""
        return f"{self.num_ok:,} answered, {self.num_failed:,} failed, {rate:,.1f} tok/s{ttft}"


@contextlib.asynccontextmanager
async def watch(console: Console, level: Level, name: str) -> AsyncIterator[Meter]:
    """Show a level while it runs, and its figures afterwards. console: not that of the results."""
    meter = Meter(level)
    progress = Progress(
        TextColumn("{task.description:>16}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    task_id = progress.add_task(name, total=meter.total(), figures="")

    def draw() -> None:
        progress.update(task_id, completed=meter.done(), figures=meter.text())
        progress.refresh()

    async def keep_drawing() -> None:
        while True:
            draw()
            await asyncio.sleep(DRAW_SECONDS)

    with progress:
        drawing = asyncio.create_task(keep_drawing())
        try:
            yield meter
        finally:
            drawing.cancel()
            draw()
    if not console.is_terminal:
        console.print(f"{name}: {meter.text()}", markup=False, highlight=False, soft_wrap=True)
