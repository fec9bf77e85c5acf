"""Every family against an independent implementation, and against itself: see `parity.measure`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parity
from tiny import FAMILIES, Reference
from toptwo.models.registry import ARCHITECTURES
from toptwo_kernels.registry import BACKENDS

Checkpoint = tuple[Path, Reference]


def test_every_architecture_has_a_tiny_checkpoint() -> None:
    assert sorted(FAMILIES) == sorted(ARCHITECTURES)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, FAMILIES[request.param].write(directory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_family_computes_what_it_should(checkpoint: Checkpoint, backend: str) -> None:
    directory, reference = checkpoint
    found = parity.measure(directory, reference, backend=backend, quantization="none")
    assert found.max_error < 1e-4
    assert found.greedy == parity.GREEDY_TOKENS
    if backend == "cpu":  # the reference's sums depend on a step's shape
        assert found.chunked_is_whole
        assert found.cached_is_whole
        assert found.batched_is_alone


def test_int8_is_what_the_reference_kernels_make_of_it(checkpoint: Checkpoint) -> None:
    chunks = [len(parity.PROMPT)]
    native, plain = (
        parity.prompt_logits(checkpoint[0], chunks, backend=backend, quantization="int8")
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(native, plain, atol=5e-3, rtol=0)


def test_int8_stays_close_and_is_batch_invariant(checkpoint: Checkpoint) -> None:
    directory, reference = checkpoint
    with torch.inference_mode():
        expected = reference(parity.PROMPT)
    found = parity.measure(directory, reference, backend="cpu", quantization="int8")
    assert found.typical_error < 0.03 * float(expected.abs().max())
    assert found.chunked_is_whole
    assert found.cached_is_whole
    assert found.batched_is_alone
