"""Servers for the promises that take long to test: real processes with a tiny model, on loopback."""

from __future__ import annotations

import pytest

from e2e.conftest import checkpoint, server, start

__all__ = ["checkpoint", "server", "start"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-seconds", type=float, default=90.0, help="how long the soak lasts")
    parser.addoption(
        "--soak-seed", type=int, default=None, help="which faults it draws; by default others each time"
    )
