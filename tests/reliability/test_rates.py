"""What needs no model costs next to nothing, with a key or without: wrk's figures."""

from __future__ import annotations

import re
import subprocess

import pytest

from reliability.figures import record
from server_process import ServerProcess

SECONDS, NUM_CONNECTIONS = 5, 64
LEAST_RATE = 300  # per second; several times as many on two idle cores


@pytest.mark.parametrize(("path", "status"), [("/health/ready", 200), ("/v1/models", 401)])
def test_cheap_answers_are_cheap(server: ServerProcess, path: str, status: int) -> None:
    """wrk counts other answers than 2xx and 3xx, which those without a key must all be."""
    done = subprocess.run(
        ["wrk", "-t1", f"-c{NUM_CONNECTIONS}", f"-d{SECONDS}s", "--latency", server.root + path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    number = int(read(r"(\d+) requests in", done.stdout))
    refused = int(read(r"Non-2xx or 3xx responses: (\d+)", done.stdout, "0"))
    broken = read(r"Socket errors: (.*)", done.stdout, "")
    assert refused == (number if status == 401 else 0)
    assert not broken, done.stdout
    rate = float(read(r"Requests/sec: +([\d.]+)", done.stdout))
    assert rate >= LEAST_RATE
    slowest = read(r"99% +(\S+)", done.stdout)
    what = f"wrk on {path} with {NUM_CONNECTIONS} connections for {SECONDS} s: {status}"
    record("Cheap answers", what, f"{number:,}", 0, f"{rate:,.0f} per second, 99 % within {slowest}")


def read(pattern: str, text: str, default: str | None = None) -> str:
    found = re.search(pattern, text)
    if found:
        return found[1]
    assert default is not None, text
    return default
