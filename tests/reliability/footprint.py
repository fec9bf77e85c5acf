"""What a server holds while nobody asks anything of it: memory, files, threads, tasks, KV blocks.

Knows the processes of a server and its /metrics; must not know requests.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from reliability.live import engine_of
from reliability.wire import Target, ask
from server_process import ServerProcess

TASK_SWITCH = Path(__file__).parent / "task_switch"
QUIET_SECONDS = 10.0  # within which everything must have been given back


@dataclass(frozen=True)
class Footprint:
    """Of the API process and the engine, in this order. memory: resident MB."""

    memory: tuple[float, float]
    files: tuple[int, int]
    threads: tuple[int, int]
    tasks: int

    @property
    def counts(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        """What must be the same before and after."""
        return self.files, self.threads, self.tasks


@dataclass(frozen=True)
class Watched:
    """A server that was started with `switches(directory)` in its environment."""

    server: ServerProcess
    tasks_file: Path

    @staticmethod
    def switches(directory: Path) -> dict[str, str]:
        """Variables for the server."""
        return {"PYTHONPATH": str(TASK_SWITCH), "TASKS_FILE": str(directory / "tasks")}

    async def footprint(self) -> Footprint:
        """Now, or as soon as what connections left behind has gone: the smallest of a few looks."""
        api, engine = psutil.Process(self.server.process.pid), engine_of(self.server)
        tasks = await self._num_tasks()
        return Footprint(
            (api.memory_info().rss / 1e6, engine.memory_info().rss / 1e6),
            (api.num_fds(), engine.num_fds()),
            (api.num_threads(), engine.num_threads()),
            tasks,
        )

    async def quiet_footprint(self, counts: object) -> Footprint:
        """The footprint when its counts are these; after ten seconds, whatever it is."""
        deadline = asyncio.get_running_loop().time() + QUIET_SECONDS
        while True:
            found = await self.footprint()
            if found.counts == counts or asyncio.get_running_loop().time() > deadline:
                return found
            await asyncio.sleep(0.1)

    async def _num_tasks(self) -> int:
        self.tasks_file.unlink(missing_ok=True)
        os.kill(self.server.process.pid, signal.SIGUSR1)
        async with asyncio.timeout(QUIET_SECONDS):
            while not self.tasks_file.exists():
                await asyncio.sleep(0.01)
        return int(self.tasks_file.read_text())


async def used_blocks(server: ServerProcess, target: Target) -> int:
    """KV blocks that something holds: 0 as soon as there are none, else what is left after ten seconds."""
    total = re.search(r"in ([\d,]+) blocks", server.out)
    assert total
    deadline = asyncio.get_running_loop().time() + QUIET_SECONDS
    while True:
        reply = await ask(target.port, target.get("/metrics"))
        share = re.search(r"(?m)^toptwo:kv_cache_usage_perc\S* (\S+)$", reply.body.decode())
        if share and (float(share[1]) == 0 or asyncio.get_running_loop().time() > deadline):
            return round(float(share[1]) * int(total[1].replace(",", "")))
        await asyncio.sleep(0.2)


def slope(values: Sequence[float], step: float) -> float:
    """How much the values grow per unit, by least squares, when they lie `step` units apart."""
    return statistics.linear_regression([n * step for n in range(len(values))], values).slope
