"""The command `llm`, set up as its documentation says, in a directory of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "large": {"type": "boolean"}},
    "required": ["colour", "large"],
    "additionalProperties": False,
}


@pytest.fixture
def home(tmp_path: Path, run_snippet: Callable[..., str]) -> Path:
    """Its directory after the snippet, which must have answered."""
    directory = tmp_path / "llm"
    directory.mkdir()
    assert run_snippet("snippet.sh", LLM_USER_PATH=str(directory)).strip()
    return directory


def llm(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("llm")), *arguments],
        env={**os.environ, "LLM_USER_PATH": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_snippet_answers(home: Path) -> None:
    assert (home / "extra-openai-models.yaml").exists()


@pytest.mark.parametrize("streaming", [[], ["--no-stream"]])
def test_an_answer_with_usage(home: Path, streaming: list[str]) -> None:
    done = llm(home, "-m", "toptwo", "-o", "max_tokens", "8", "-u", *streaming, "hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8 output" in done.stderr


def test_a_schema(home: Path) -> None:
    done = llm(home, "-m", "toptwo", "--schema", json.dumps(SCHEMA), "a thing")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["colour"] in ("red", "green")


def test_a_conversation_goes_on(home: Path) -> None:
    for arguments in (["hello"], ["-c", "and then?"]):
        done = llm(home, "-m", "toptwo", "-o", "max_tokens", "8", *arguments)
        assert done.returncode == 0, done.stderr


def test_errors_are_shown(home: Path) -> None:
    done = llm(home, "-m", "toptwo", "hello " * 9000)
    assert done.returncode == 1
    assert "maximum context length" in done.stderr
    done = llm(home, "-m", "toptwo", "--key", "sk-wrong", "hello")
    assert done.returncode == 1
    assert "401" in done.stderr
