"""Accounts as people use them: made on the machine, used over HTTP, and still there after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server_process import ServerProcess

Start = Callable[..., ServerProcess]


@pytest.fixture
def toptwo(tmp_path: Path) -> Callable[..., Any]:
    """Runs a command with --json on the data directory, and returns what it says."""

    def run(*arguments: str) -> Any:
        environment = {**os.environ, "TOPTWO_DATA_DIR": str(tmp_path / "data")}
        command = [sys.executable, "-m", "toptwo", *arguments, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def ask(server: ServerProcess, key: str, **fields: object) -> httpx2.Response:
    body = {
        "model": "tiny-moe",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        **fields,
    }
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=60)


def test_the_life_of_a_key(start: Start, tmp_path: Path, toptwo: Callable[..., Any]) -> None:
    made = toptwo("keys", "create")
    toptwo("prices", "set", "tiny-moe", "--completion", "1000")
    data = {"TOPTWO_DATA_DIR": str(tmp_path / "data")}
    server = start(**data).wait_until_ready()
    assert "toptwo keys create" in server.out  # where a key is to be had; none is made by the server
    assert "sk-toptwo-" not in server.out
    first = ask(server, made["key"])
    assert first.status_code == 200, first.text
    used = first.json()["usage"]
    rotated = toptwo("keys", "rotate", made["id"], "--overlap", "1h")
    assert ask(server, rotated["key"]).status_code == 200
    headers = {"Authorization": f"Bearer {rotated['key']}"}
    shown = httpx2.get(f"{server.url}/key", headers=headers).json()
    assert shown["rotated_from"] == made["id"]

    toptwo("keys", "revoke", rotated["id"])
    deadline = time.monotonic() + 6  # a key that is revoked elsewhere is accepted for 5 s at most
    while ask(server, rotated["key"], max_tokens=1).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    before = toptwo("usage", "--by", "key")

    server.stop(signal.SIGKILL)
    again = start(**data).wait_until_ready()
    assert toptwo("usage", "--by", "key") == before
    mine = next(row for row in before if row["key"] == made["id"])
    assert (mine["requests"], mine["completion_tokens"]) == (1, used["completion_tokens"])
    assert mine["cost_microcredits"] == 1000 * used["completion_tokens"]
    assert ask(again, made["key"]).status_code == 200
    assert again.stop() == 0
    balance = toptwo("accounts", "list")[0]["balance_microcredits"]
    assert balance == 500_000 - sum(row["cost_microcredits"] for row in toptwo("usage", "--by", "key"))
    assert [entry["action"] for entry in toptwo("accounts", "audit")][-1] == "account.create"
    for text in (server.out, server.err, again.out, again.err):
        assert made["key"] not in text
        assert rotated["key"] not in text


def test_the_management_api_makes_keys_that_work(start: Start) -> None:
    server = start(TOPTWO_ADMIN_KEY="an-admin-key").wait_until_ready()
    with httpx2.Client(base_url=server.root, headers={"Authorization": "Bearer an-admin-key"}) as admin:
        account = admin.post("/v3/admin/accounts", json={"name": "team"}).json()
        assert account["balance_microcredits"] == 500_000
        made = admin.post("/v3/admin/keys", json={"name": "k", "account_id": account["id"]}).json()
        assert ask(server, made["key"]).status_code == 200
        assert admin.delete(f"/v3/admin/keys/{made['id']}").json()["status"] == "revoked"
        assert ask(server, made["key"]).status_code == 401  # at once
        rows = admin.get("/v3/admin/usage", params={"by": "key,model"}).json()["data"]
        assert [(row["key"], row["model"], row["requests"]) for row in rows] == [(made["id"], "tiny-moe", 1)]
    assert server.stop() == 0


def test_contradictions_end_the_start(start: Start) -> None:
    server = start("--accounts", "off", TOPTWO_ADMIN_KEY="an-admin-key")
    assert server.process.wait(60) == 1
    assert "--accounts off" in server.err
    assert "an-admin-key" not in server.err
