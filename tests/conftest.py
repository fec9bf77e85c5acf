"""Options of the whole suite."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

NATIVE = "toptwo_kernels.cpu._native"

collect_ignore = ["reliability"]  # it takes minutes; make test-reliability names it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native", type=Path, help="test this build of the native extension, not the installed one"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--native")
    if path:
        spec = spec_from_file_location(NATIVE, path)
        assert spec
        assert spec.loader
        sys.modules[NATIVE] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NATIVE])
