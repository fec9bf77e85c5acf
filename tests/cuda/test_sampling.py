"""The CUDA backend draws what the reference draws for the same uniform, but for rounding (see `drawing`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from drawing import GRID, batch, make_logits, possible
from toptwo_kernels import reference
from toptwo_kernels.cuda.device import Device
from toptwo_kernels.cuda.sampling import sample
from toptwo_kernels.ops import SamplingBatch


def draw(device: Device, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
    """On the device, and back."""
    return sample(device, logits_RV.to(device.torch_device), sampling).cpu()


@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "flat"])
@pytest.mark.parametrize("vocab", [1, 7, 320, 5000, 151_936])
def test_same_token_for_the_same_uniform(
    device: Device, generator: torch.Generator, kind: str, vocab: int
) -> None:
    is_large = vocab > 5000
    if device.interpreted or is_large:
        num_draws = 100 if not device.interpreted else 4 if is_large else 40
        grid = GRID[torch.randperm(len(GRID), generator=generator)[:num_draws]]
    else:
        grid = GRID.repeat(5, 1)
    uniforms = torch.rand(len(grid), 1, dtype=torch.float64, generator=generator)
    uniforms[0], uniforms[1] = 0.0, 1 - 2.0**-53
    filters = torch.cat((grid, uniforms), 1)
    logits = make_logits(kind, len(grid), vocab, generator)
    got, expected = draw(device, logits, batch(filters)), reference.sample(logits, batch(filters))
    differs = (got != expected).nonzero().flatten().tolist()
    assert len(differs) <= 0.002 * len(grid) + 1
    every_tenth = range(0, len(grid), 100 if is_large else 10)
    for row in {*differs, *every_tenth}:
        token = int(got[row])
        assert possible(logits[row], filters[row].tolist(), token), filters[row].tolist()
        another = (token + vocab // 2) % vocab
        assert vocab == 1 or not possible(logits[row], filters[row].tolist(), another)


def test_draws_of_one_row_follow_the_uniform(device: Device) -> None:
    """Every token has its own part of [0, 1), in the order that the rules give."""
    logits = torch.tensor([0.0, 3.0, -torch.inf, 1.0, 2.0, 3.0, 0.5])
    num_uniforms = 8 if device.interpreted else 120
    uniforms = torch.linspace(0, 1, num_uniforms + 1, dtype=torch.float64)[:-1] + 1e-4
    for top_k, top_p, min_p in itertools.product((0, 1, 3, 6), (0.0, 0.7, 1.0), (0.0, 0.2, 1.0)):
        row = torch.tensor([0.8, top_k, top_p, min_p], dtype=torch.float64)
        filters = torch.cat((row.expand(len(uniforms), 4), uniforms[:, None]), 1)
        rows = logits.expand(len(uniforms), -1).contiguous()
        got, expected = draw(device, rows, batch(filters)), reference.sample(rows, batch(filters))
        assert torch.equal(got, expected)
        assert 2 not in got


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [1, 7, 20])
def test_a_row_that_is_no_number_gets_minus_one(
    device: Device, generator: torch.Generator, bad: float, vocab: int
) -> None:
    for filters in GRID[:: 40 if device.interpreted else 7].tolist():
        logits = torch.randn(vocab + 2, vocab, generator=generator)
        logits[range(vocab), range(vocab)] = bad  # at every place once
        logits[-1] = -torch.inf
        rows = torch.tensor([[*filters, 0.5]] * (vocab + 2), dtype=torch.float64)
        got = draw(device, logits, batch(rows))
        assert got[:vocab].tolist() == [-1] * vocab
        assert 0 <= got[vocab] < vocab
        assert got[-1] == -1


@pytest.mark.parametrize("vocab", [1, 7, 320, 5000])
def test_the_lowest_id_among_the_largest(device: Device, generator: torch.Generator, vocab: int) -> None:
    for first in {0, vocab // 3, vocab // 2, vocab - 1}:
        logits = torch.randn(1, vocab, generator=generator).clamp(max=1.0)
        logits[0, first::2] = 2.0
        filters = torch.tensor([[0.0, 0, 1, 0, 0.9]], dtype=torch.float64)
        assert draw(device, logits, batch(filters)).tolist() == [first]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44, 1e-60])
def test_tiny_temperatures_take_the_largest(
    device: Device, generator: torch.Generator, temperature: float
) -> None:
    logits = torch.randn(1, 100, generator=generator)
    logits[0, 13] = 5
    for top_p in (1.0, 0.9):
        filters = torch.tensor([[temperature, 0, top_p, 0, 0.999]], dtype=torch.float64)
        assert draw(device, logits, batch(filters)).tolist() == [13]


def test_penalties_are_the_references(device: Device, generator: torch.Generator) -> None:
    """Of long and empty lists; the logits are left as they are."""
    rows, vocab = 8, 3000
    for _ in range(2 if device.interpreted else 20):
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        filters = GRID[torch.randint(len(GRID), (rows,), generator=generator)]
        filters = torch.cat((filters, torch.rand(rows, 1, dtype=torch.float64, generator=generator)), 1)
        penalized = [1, 2, 5, 7]
        contexts = [torch.randint(vocab, (n,), generator=generator) for n in (0, 5, 1500, 4000)]
        contexts[1][:] = logits[2].argmax()
        before = logits.to(device.torch_device)
        sampling = SamplingBatch(
            filters,
            penalty_rows=penalized,
            presence=[0.5, 50.0, 0.0, -1.0],
            frequency=[0.0, 0.3, 2.0, 1.7],
            repetition=[1.0, 1.5, 1.2, 0.7],
            generated_tokens=[tokens[len(tokens) // 2 :] for tokens in contexts],
            context_tokens=contexts,
        )
        given = before.clone()
        got, expected = sample(device, given, sampling).cpu(), reference.sample(logits, sampling)
        assert torch.equal(given, before)
        after = reference.sampling.penalize(logits, sampling)
        for row in range(rows):
            assert got[row] == expected[row] or possible(after[row], filters[row].tolist(), int(got[row]))
        assert int((got != expected).sum()) <= 1
        assert got[2] != contexts[1][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_fewer_bits(device: Device, generator: torch.Generator, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(16, 320, generator=generator)).to(dtype)
    filters = torch.cat((GRID[200:216], torch.rand(16, 1, dtype=torch.float64, generator=generator)), 1)
    assert torch.equal(draw(device, logits, batch(filters)), draw(device, logits.float(), batch(filters)))


def test_a_row_does_not_know_the_others(device: Device, generator: torch.Generator) -> None:
    logits = torch.randn(8, 5000, generator=generator)
    filters = torch.cat((GRID[200:208], torch.rand(8, 1, dtype=torch.float64, generator=generator)), 1)
    whole = draw(device, logits, batch(filters))
    for row in range(8):
        alone = draw(device, logits[row : row + 1].clone(), batch(filters[row : row + 1]))
        assert torch.equal(alone, whole[row : row + 1])
