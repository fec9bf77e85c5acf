"""Fixtures of the Python clients: where the server is, and the client's snippet for the README.

A pytest plugin (`-p served`), loaded in environments that hold one client each: it may import nothing but
pytest and the standard library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """Base URL for OpenAI clients."""
    return os.environ["OPENAI_BASE_URL"]


@pytest.fixture(scope="session")
def key() -> str:
    """The key that the server accepts."""
    return os.environ["OPENAI_API_KEY"]


@pytest.fixture(scope="session")
def model() -> str:
    """Id of the served model."""
    return os.environ["MODEL"]


@pytest.fixture
def run_snippet(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """Run the snippet beside the calling check as a person would; returns what it prints."""

    def run(name: str = "snippet.py", **environment: str) -> str:
        path = request.path.parent / name
        command = [sys.executable, str(path)] if path.suffix == ".py" else ["sh", "-eu", str(path)]
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PATH": binaries, **environment},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{done.stderr.strip().rpartition(chr(10))[2]}\n{done.stderr}"
        return done.stdout

    return run
