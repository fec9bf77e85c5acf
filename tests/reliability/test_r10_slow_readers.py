"""R10: clients that stop reading harm only themselves."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from reliability.figures import record
from reliability.footprint import used_blocks
from reliability.wire import Target
from server_process import ServerProcess

NUM_READERS, NUM_STALLED = 8, 50
SEND_TIMEOUT = 3  # seconds, instead of sixty
SECONDS = 5.0  # of each measurement
MOST_MB_PER_STALLED = 1.0  # in the server, for whatever is waiting to be read
FAULT_SWITCH = Path(__file__).parents[1] / "fault_switch"
SLOW_STEPS = "slow@20*"  # milliseconds: so that streams are bounded by steps, not by the test's own reading


class Stream:
    """A stream that counts its pieces, or does not read at all and then notes when it was cut."""

    def __init__(self, target: Target, tokens: int, **fields: object) -> None:
        self.request = target.post("/chat/completions", target.stream("hello", tokens, **fields))
        self.port = target.port
        self.pieces = 0

    async def read(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        try:
            writer.write(self.request)
            while data := await reader.read(1 << 18):
                self.pieces += data.count(b"data: ")
        finally:
            writer.close()

    async def stall(self) -> float:
        """When it was cut, on the monotonic clock: the server's end of the connection tells."""
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", self.port))
            await loop.sock_sendall(client, self.request)
            here = client.getsockname()[1]
            async with asyncio.timeout(120):
                while here in await asyncio.to_thread(_open_ports, self.port):
                    await asyncio.sleep(0.25)
        return time.monotonic()


def _open_ports(port: int) -> set[int]:
    """Client ports of the connections that the server has, whatever the clients think."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = f":{port:04X}"
    return {int(line[2][-4:], 16) for line in lines if line[1].endswith(mine) and line[3] == "01"}


async def rate(readers: list[Stream], seconds: float) -> float:
    """Pieces per second of all of them together."""
    before, began = sum(r.pieces for r in readers), time.monotonic()
    await asyncio.sleep(seconds)
    return (sum(r.pieces for r in readers) - before) / (time.monotonic() - began)


async def test_slow_readers(start: Callable[..., ServerProcess]) -> None:
    """The others' speed is compared with that beside as many streams that are read."""
    arguments = ["--send-timeout", str(SEND_TIMEOUT), "--max-num-seqs", "64"]
    server = start(*arguments, PYTHONPATH=str(FAULT_SWITCH), FAULTS=SLOW_STEPS).wait_until_ready()
    target = Target.of(server)
    api = psutil.Process(server.process.pid)
    verbose = {"logprobs": True, "top_logprobs": 20}
    async with asyncio.TaskGroup() as group:
        readers = [Stream(target, 3000) for _ in range(NUM_READERS)]
        reading = [group.create_task(reader.read()) for reader in readers]
        await asyncio.sleep(1)
        beside = [group.create_task(Stream(target, 3000, **verbose).read()) for _ in range(NUM_STALLED)]
        await asyncio.sleep(1)
        alone = await rate(readers, SECONDS)
        for task in beside:
            task.cancel()
        await asyncio.sleep(1)
        memory = api.memory_info().rss
        began = time.monotonic()
        stalled = [group.create_task(Stream(target, 3000, **verbose).stall()) for _ in range(NUM_STALLED)]
        await asyncio.sleep(1)
        rates = [await rate(readers, SECONDS)]
        most = memory
        while not all(task.done() for task in stalled):
            most = max(most, api.memory_info().rss)
            rates.append(await rate(readers, 0.5))
        grown = (most - memory) / 1e6 / NUM_STALLED
        for task in reading:
            task.cancel()
    last = max(task.result() for task in stalled) - began
    share = rates[0] / alone
    assert await used_blocks(server, target) == 0
    figure = (
        f"others at {share:.0%} of their speed; {grown:.2f} MB kept per stalled stream; all cut and their KV "
        f"freed after {last:.0f} s, with a send timeout of {SEND_TIMEOUT} s"
    )
    print(figure)
    assert share >= 0.9, figure
    assert grown <= MOST_MB_PER_STALLED, figure
    record(
        "R10",
        f"{NUM_STALLED} streams whose clients stop reading, beside {NUM_READERS}",
        NUM_STALLED,
        0,
        figure,
    )
