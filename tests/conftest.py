"""Options of the whole suite."""

from __future__ import annotations

import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

NATIVE = "toptwo_kernels.cpu._native"

# The first takes minutes, the second wants Triton: make test-reliability and test-cuda-interpreted name them.
collect_ignore = ["reliability", "cuda"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native", type=Path, help="test this build of the native extension, not the installed one"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs and their children ignore SIGINT: tests that send it must not depend on that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = config.getoption("--native")
    if path:
        spec = spec_from_file_location(NATIVE, path)
        assert spec
        assert spec.loader
        sys.modules[NATIVE] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NATIVE])
