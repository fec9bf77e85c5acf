"""The snippet of the README runs as it stands."""

from __future__ import annotations

from collections.abc import Callable


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet().strip()
