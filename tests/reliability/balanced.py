"""Two replicas behind HAProxy, as `deploy/haproxy.cfg` sets it up, each on a line that can be harmed.

Knows processes and HAProxy's statistics; must not know what is asked of the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from faultproxy import FaultProxy
from reliability.live import checkpoint, engine_of
from reliability.wire import Target
from server_process import ServerProcess

CONFIG = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
KEY = "sk-both-replicas"
START_SECONDS = 90.0
EXIT_SECONDS = 90.0


@dataclass
class Replica:
    """A server that keeps its port over restarts, and the line that leads to it.

    errors: what earlier processes of it wrote to standard error.
    """

    name: str
    directory: Path
    port: int
    line: FaultProxy
    arguments: tuple[str, ...]
    errors: list[str] = field(default_factory=list)
    num_starts: int = 0
    server: ServerProcess = field(init=False)

    def start(self) -> None:
        """A new process; `wait_until_ready` waits for it."""
        if self.num_starts:
            self.errors.append(self.server.err)
        self.num_starts += 1
        fixed = ["--port", str(self.port), "--api-key", KEY, "--threads", "1"]
        directory = self.directory / f"{self.name}-{self.num_starts}"
        self.server = ServerProcess(directory, [str(checkpoint()), *fixed, *self.arguments])

    async def wait_until_ready(self) -> None:
        await asyncio.to_thread(self.server.wait_until_ready)

    async def drain(self) -> int:
        """SIGTERM, as a rolling restart sends it; the exit status."""
        os.kill(self.server.process.pid, signal.SIGTERM)
        return await asyncio.to_thread(self.server.process.wait, EXIT_SECONDS)

    def kill(self) -> psutil.Process:
        """SIGKILL to the API process alone; returns the engine that it leaves behind."""
        engine = engine_of(self.server)
        os.kill(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()
        return engine

    def end(self) -> None:
        """Whatever is left of it."""
        self.server.kill()

    @property
    def is_ready(self) -> bool:
        return self.server.process.poll() is None and self.server.readiness() == 200


@dataclass(frozen=True)
class Balanced:
    """HAProxy and its replicas. target: where requests go."""

    target: Target
    replicas: tuple[Replica, Replica]
    statistics: Path

    async def states(self) -> dict[str, str]:
        """What HAProxy thinks of its replicas: UP, DOWN and words between."""
        reader, writer = await asyncio.open_unix_connection(str(self.statistics))
        writer.write(b"show stat\n")
        lines = (await reader.read()).decode().splitlines()
        writer.close()
        names = lines[0].removeprefix("# ").split(",")
        rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]
        return {row["svname"]: row["status"] for row in rows if row["svname"].startswith("replica-")}

    async def wait_until_up(self) -> None:
        """Until HAProxy sends requests to both."""
        async with asyncio.timeout(START_SECONDS):
            while set((await self.states()).values()) != {"UP"}:
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def balanced(directory: Path, *arguments: str) -> AsyncIterator[Balanced]:
    """Two replicas with these arguments, ready, and what stands before them; all gone afterwards."""
    async with contextlib.AsyncExitStack() as stack:
        replicas = []
        for number in (1, 2):
            port = free_port()
            line = await stack.enter_async_context(FaultProxy(port, seed=number))
            replica = Replica(f"replica-{number}", directory, port, line, arguments)
            replica.start()
            stack.callback(replica.end)
            replicas.append(replica)
        await asyncio.gather(*(replica.wait_until_ready() for replica in replicas))
        balancer = Balanced(Target(free_port(), KEY), (replicas[0], replicas[1]), directory / "statistics")
        process = start_haproxy(directory, balancer)
        stack.callback(process.wait)
        stack.callback(process.kill)
        async with asyncio.timeout(10):
            while not balancer.statistics.exists():
                assert process.poll() is None, (directory / "haproxy.txt").read_text()
                await asyncio.sleep(0.05)
        await balancer.wait_until_up()
        yield balancer
        assert process.poll() is None, "HAProxy ended"


def start_haproxy(directory: Path, balancer: Balanced) -> subprocess.Popen[bytes]:
    """HAProxy with the example's configuration, and beside it a socket for its statistics."""
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "haproxy is not installed"
    more = directory / "statistics.cfg"
    more.write_text(f"global\n    stats socket {balancer.statistics}\n")
    addresses = {"LISTEN": f"127.0.0.1:{balancer.target.port}"}
    for number, replica in enumerate(balancer.replicas, 1):
        addresses[f"REPLICA_{number}"] = f"127.0.0.1:{replica.line.port}"
    with (directory / "haproxy.txt").open("wb") as output:
        return subprocess.Popen(
            [program, "-db", "-f", str(CONFIG), "-f", str(more)],
            env={**os.environ, **addresses},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    """A port that is free now; it is taken a moment later."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
