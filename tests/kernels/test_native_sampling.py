"""The native sampler draws what the reference draws for the same uniform but for rounding (see `drawing`)."""

from __future__ import annotations

import itertools

import pytest
import torch

from drawing import GRID, batch, make_logits, possible
from native import INSTRUCTION_SETS, backend, normal
from toptwo_kernels import reference
from toptwo_kernels.ops import SamplingBatch

every_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)


@every_instruction_set
@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "flat"])
@pytest.mark.parametrize(("vocab", "draws"), [(1, 1), (7, 3), (320, 2), (49_152, 0)])
def test_same_token_for_the_same_uniform(isa: str, kind: str, vocab: int, draws: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # Of the largest vocabulary, where the reference takes its time, a sample of the grid.
    grid = GRID.repeat(draws, 1) if draws else GRID[torch.randperm(len(GRID), generator=generator)[:50]]
    uniforms = torch.rand(len(grid), 1, dtype=torch.float64, generator=generator)
    uniforms[0], uniforms[1] = 0.0, 1 - 2.0**-53
    filters = torch.cat((grid, uniforms), 1)
    logits = make_logits(kind, len(grid), vocab, generator)
    got, expected = backend(isa).sample(logits, batch(filters)), reference.sample(logits, batch(filters))
    differs = (got != expected).nonzero().flatten().tolist()
    assert len(differs) <= 0.002 * len(grid) + 1
    every_tenth = range(0, len(grid), 10)
    for row in {*differs, *every_tenth}:
        assert possible(logits[row], filters[row].tolist(), int(got[row])), filters[row].tolist()
        assert (
            not possible(logits[row], filters[row].tolist(), (int(got[row]) + vocab // 2) % vocab)
            or vocab == 1
        )


@every_instruction_set
def test_draws_of_one_row_follow_the_uniform(isa: str) -> None:
    """Every token has its own part of [0, 1), in the order that the rules give."""
    logits = torch.tensor([0.0, 3.0, -torch.inf, 1.0, 2.0, 3.0, 0.5])
    uniforms = torch.linspace(0, 1, 121, dtype=torch.float64)[:-1] + 1e-4
    for top_k, top_p, min_p in itertools.product((0, 1, 3, 6), (0.0, 0.7, 1.0), (0.0, 0.2, 1.0)):
        row = torch.tensor([0.8, top_k, top_p, min_p], dtype=torch.float64)
        filters = torch.cat((row.expand(len(uniforms), 4), uniforms[:, None]), 1)
        rows = logits.expand(len(uniforms), -1).contiguous()
        got, expected = backend(isa).sample(rows, batch(filters)), reference.sample(rows, batch(filters))
        assert torch.equal(got, expected)
        assert 2 not in got


@every_instruction_set
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_gets_minus_one(isa: str, bad: float) -> None:
    for vocab, filters in itertools.product((1, 7, 8, 20), GRID[::7].tolist()):
        logits = normal(vocab + 2, vocab)
        logits[range(vocab), range(vocab)] = bad  # at every place once
        logits[-1] = -torch.inf
        rows = torch.tensor([[*filters, 0.5]] * (vocab + 2), dtype=torch.float64)
        got = backend(isa).sample(logits, batch(rows))
        assert got[:vocab].tolist() == [-1] * vocab
        assert 0 <= got[vocab] < vocab
        assert got[-1] == -1


@every_instruction_set
def test_the_lowest_id_among_the_largest(isa: str) -> None:
    for vocab in (1, 7, 8, 9, 16, 31, 320):
        for first in range(0, vocab, 3):
            logits = normal(1, vocab).clamp(max=1.0)
            logits[0, first::2] = 2.0
            filters = torch.tensor([[0.0, 0, 1, 0, 0.9]], dtype=torch.float64)
            assert backend(isa).sample(logits, batch(filters)).tolist() == [first]


@every_instruction_set
@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44, 1e-60])
def test_tiny_temperatures_take_the_largest(isa: str, temperature: float) -> None:
    logits = normal(1, 100)
    for top_p in (1.0, 0.9):
        filters = torch.tensor([[temperature, 0, top_p, 0, 0.999]], dtype=torch.float64)
        assert backend(isa).sample(logits, batch(filters)).tolist() == [int(logits.argmax())]


@every_instruction_set
def test_penalties_come_first(isa: str) -> None:
    logits = normal(3, 50)
    filters = torch.tensor([[0.0, 0, 1, 0, 0], [1, 0, 0.9, 0, 0.4], [1, 5, 1, 0, 0.7]], dtype=torch.float64)
    best = int(logits[0].argmax())
    tokens = [torch.tensor([best, 3, 3]), torch.tensor([4, 9])]
    penalized = SamplingBatch(filters, [0, 2], [50.0, 0.0], [0.0, 2.0], [1.0, 1.5], tokens, tokens)
    before = logits.clone()
    got = backend(isa).sample(logits, penalized)
    assert torch.equal(got, reference.sample(logits, penalized))
    assert got[0] != best
    assert torch.equal(logits, before)


def test_draws_do_not_depend_on_threads() -> None:
    logits = normal(64, 320)
    filters = torch.cat((GRID[200:264], torch.rand(64, 1, dtype=torch.float64)), 1)
    one, three = (backend(INSTRUCTION_SETS[-1], n).sample(logits, batch(filters)) for n in (1, 3))
    assert torch.equal(one, three)
