"""The device under test, fresh random numbers, and memory that shows what kernels do beside their outputs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from cuda_harness import GuardedMemory  # before anything that imports Triton

if TYPE_CHECKING:
    from toptwo_kernels.cuda.device import Device

Normal = Callable[..., Tensor]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="of random inputs; by default another each time")


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter's maximum of NaNs alone, which on a card is NaN without a word.
    config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")


@pytest.fixture(scope="session")
def device() -> Device:
    from toptwo_kernels.cuda.device import open_device

    return open_device()


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test, or what it tests, takes from torch.empty is poisoned and guarded."""
    memory = GuardedMemory()
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(torch, "empty_like", memory.empty_like)
    yield
    memory.check()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Of the processor, seeded anew for every test; the seed is printed."""
    given = request.config.getoption("--seed")
    seed = secrets.randbelow(2**32) if given is None else int(given)
    print(f"--seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def normal(device: Device, generator: torch.Generator, guarded_memory: None) -> Normal:
    """normal(*shape, dtype=torch.float32): random numbers on the device, NaN on either side of them."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device.torch_device).copy_(
            torch.randn(shape, generator=generator)
        )

    return make
