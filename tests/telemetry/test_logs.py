"""Logs are one line per event, whatever is in it, and never show local variables."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

PROGRAM = r"""
import structlog
from toptwo.telemetry.logs import configure_logging
configure_logging("info", quoting=True)
log = structlog.get_logger()
log.info("model\nforged", name="a\r\n{\"level\": \"error\"}\x1b[31m")
log.debug("too quiet")
try:
    secret = "sk-" + "x" * 20
    raise ValueError("on purpose")
except ValueError:
    log.exception("failed")
"""


QUIET = r"""
import logging
from toptwo.telemetry.logs import configure_logging
configure_logging("%s", quoting=False)
def fail():
    try:
        raise KeyError("xxxxxxxx")
    except KeyError as cause:
        raise ExceptionGroup("xxxxxxxx", [ValueError("xxxxxxxx")]) from cause
try:
    fail()
except Exception:
    logging.getLogger("a library").exception("failed")
"""


def test_json_lines_cannot_be_forged() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["model\nforged", "failed"]
    assert "\x1b" not in done.stderr
    assert "ValueError: on purpose" in lines[1]["exception"]
    assert "xxxxxxxx" not in done.stderr


def test_a_terminal_shows_no_local_variables() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", PROGRAM], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "\\x1b[31m" in shown  # what the value held, and none of it as it was
    assert "}\x1b" not in shown
    assert shown.count("forged") == 1
    assert not any(line.startswith("forged") for line in shown.splitlines())
    assert "on purpose" in shown
    assert "xxxxxxxx" not in shown


def test_exceptions_of_a_process_with_prompts_in_hand_are_not_quoted() -> None:
    command = [sys.executable, "-c", QUIET % "info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert "xxxxxxxx" not in done.stderr
    for kind in ("builtins.KeyError", "builtins.ValueError", "builtins.ExceptionGroup", "in fail"):
        assert kind in line["exception"]


def test_but_they_are_to_whoever_asks_for_everything() -> None:
    command = [sys.executable, "-c", QUIET % "debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "xxxxxxxx" in done.stderr
