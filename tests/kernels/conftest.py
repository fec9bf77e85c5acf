"""Both backends, for tests whose expectation is the contract's and so the same for each."""

from __future__ import annotations

import pytest

from toptwo_kernels.ops import Ops
from toptwo_kernels.registry import BACKENDS, load_backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def ops(backend: str) -> Ops:
    return load_backend(backend, num_threads=1)
