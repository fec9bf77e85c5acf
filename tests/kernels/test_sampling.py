"""The sampler of both backends: penalties by hand, and draws against the exact distribution."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from toptwo.messages import Row, SamplingParams
from toptwo.runtime.batch import SlotTable
from toptwo.runtime.sampler import draw_uniform, sample_rows
from toptwo_kernels.ops import Ops, SamplingBatch

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, 1.5, -1.0, 0.25, -2.0, 0.75, 1.25, -3.0])
DRAWS = 20_000


def sample(
    ops: Ops, params: list[SamplingParams], logits: torch.Tensor = LOGITS, tokens: tuple[int, ...] = (3,)
) -> list[int]:
    """One next token per entry of `params`; the context is `tokens`, of which the first is the prompt."""
    table = SlotTable(len(params), 16, 4)
    table.tokens[:, : len(tokens)] = tokens
    table.num_prompt_tokens = [1] * len(params)
    table.sampling = params
    rows = [Row(slot, 0, len(tokens), [], True) for slot in range(len(params))]
    return sample_rows(logits.expand(len(params), -1), rows, table, ops).tolist()


def exact(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    """The distribution that sampling must have, from its definition, in plain Python."""
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    probs = {i: w / sum(weights) for i, w in enumerate(weights)}
    ranked = sorted(probs, key=lambda i: (-probs[i], i))
    if top_k:
        ranked = ranked[:top_k]
        mass = sum(probs[i] for i in ranked)
        probs = {i: probs[i] / mass for i in ranked}
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= top_p:
            break
        kept.append(i)
        mass += probs[i]
    kept = [i for i in kept if probs[i] >= min_p * probs[ranked[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(VOCAB)]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(ops: Ops, setting: dict[str, float]) -> None:
    expected = np.array(exact(**setting)) * DRAWS  # type: ignore[arg-type]
    drawn = sample(ops, [SamplingParams(seed=seed, **setting) for seed in range(DRAWS)])  # type: ignore[arg-type]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0, "a token outside the kept set was drawn"
    kept = expected > 0
    # Fixed seeds, so this cannot flicker; a wrong sampler gives p-values like 1e-50.
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_positions_of_one_seed_are_independent_uniforms() -> None:
    draws = [draw_uniform(42, position) for position in range(20_000)]
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02


def test_the_uniform_is_that_of_the_seed_and_the_next_position(ops: Ops) -> None:
    flat = torch.zeros(VOCAB)  # so that the token is the uniform, in twelfths
    for length in range(1, 12):
        (token,) = sample(ops, [SamplingParams(seed=5)], flat, tokens=tuple(range(length)))
        assert token == int(draw_uniform(5, length) * VOCAB)


def test_a_draw_is_a_function_of_seed_and_position_alone(ops: Ops) -> None:
    params = SamplingParams(seed=9, temperature=1.0)
    (alone,) = sample(ops, [params])
    company = [SamplingParams(seed=i, temperature=1.0, top_p=0.8) for i in range(7)]
    assert sample(ops, [*company, params])[-1] == alone
    assert draw_uniform(-1, 3) == draw_uniform(2**64 - 1, 3)  # any int64 is a seed


def test_temperature_zero_takes_the_best_and_the_lowest_id_among_equals(ops: Ops) -> None:
    assert sample(ops, [SamplingParams(seed=0, temperature=0.0)]) == [0]
    flat = torch.zeros(VOCAB)
    flat[[4, 7]] = 1.0
    assert sample(ops, [SamplingParams(seed=0, temperature=0.0)], flat) == [4]


def test_tiny_top_p_and_top_k_one_are_greedy(ops: Ops) -> None:
    for setting in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        params = [SamplingParams(seed=s, temperature=2.0, **setting) for s in range(50)]  # type: ignore[arg-type]
        assert set(sample(ops, params)) == {0}


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44, 1e-60])
def test_tiny_temperatures_are_greedy(ops: Ops, temperature: float) -> None:
    assert set(sample(ops, [SamplingParams(seed=s, temperature=temperature) for s in range(20)])) == {0}


@pytest.mark.parametrize("setting", [{"top_k": 10**6}, {"top_p": 0.0}, {"top_k": VOCAB}], ids=str)
def test_settings_at_and_beyond_the_vocabulary(ops: Ops, setting: dict[str, float]) -> None:
    drawn = sample(ops, [SamplingParams(seed=s, temperature=1.0, **setting) for s in range(50)])  # type: ignore[arg-type]
    assert set(drawn) == {0} if "top_p" in setting else len(set(drawn)) > 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}],
    ids=str,
)
def test_a_row_of_nonsense_is_marked_and_harms_no_other(
    ops: Ops, bad: float, setting: dict[str, float]
) -> None:
    table = SlotTable(2, 16, 4)
    table.sampling = [SamplingParams(seed=1, **setting)] * 2  # type: ignore[arg-type]
    nonsense = LOGITS.clone()
    nonsense[5] = bad
    rows = [Row(slot, 0, 1, [], True) for slot in range(2)]
    got = sample_rows(torch.stack((nonsense, LOGITS)), rows, table, ops).tolist()
    assert got[0] == -1
    assert 0 <= got[1] < VOCAB


@pytest.mark.parametrize("setting", [{"repetition_penalty": 0.01}, {"repetition_penalty": 2.0}], ids=str)
def test_the_strongest_penalties_stay_numbers(ops: Ops, setting: dict[str, float]) -> None:
    params = [SamplingParams(seed=s, top_p=0.9, **setting) for s in range(20)]  # type: ignore[arg-type]
    assert all(0 <= token < VOCAB for token in sample(ops, params, LOGITS * 50, tokens=(0, 1, 11)))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-53])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.999, 0.0), (0, 1.0, 1e-9)], ids=str)
def test_a_token_without_probability_is_never_drawn(
    ops: Ops, uniform: float, filters: tuple[int, float, float]
) -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0, 0.0]])
    row = torch.tensor([[1.0, *filters, uniform]], dtype=torch.float64)
    (token,) = ops.sample(weights.log(), SamplingBatch(row, [], [], [], [], [], [])).tolist()
    assert token in (1, 3)


Penalized = Callable[..., torch.Tensor]


@pytest.fixture
def penalized(backend: str, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> Penalized:
    """The logits that the sampler sees after penalties, given context tokens and penalties."""
    sampling = importlib.import_module(f"toptwo_kernels.{backend}.sampling")
    seen: list[torch.Tensor] = []
    original = sampling.penalize
    monkeypatch.setattr(sampling, "penalize", lambda *given: seen.append(original(*given)) or seen[-1])

    def penalize(tokens: tuple[int, ...], **penalties: float) -> torch.Tensor:
        sample(ops, [SamplingParams(seed=0, temperature=0.0, **penalties)], tokens=tokens)  # type: ignore[arg-type]
        return seen[-1][0]

    return penalize


def test_presence_penalty_counts_generated_tokens_once(penalized: Penalized) -> None:
    got = penalized((3, 5, 5, 0), presence_penalty=0.75)
    expected = LOGITS.clone()
    expected[[5, 0]] -= 0.75  # token 3 is the prompt
    torch.testing.assert_close(got, expected)


def test_frequency_penalty_counts_every_occurrence(penalized: Penalized) -> None:
    got = penalized((3, 5, 5, 0), frequency_penalty=0.5, presence_penalty=0.25)
    expected = LOGITS.clone()
    expected[5] -= 1.0 + 0.25
    expected[0] -= 0.5 + 0.25
    torch.testing.assert_close(got, expected)


def test_negative_penalties_encourage(penalized: Penalized) -> None:
    got = penalized((3, 8), presence_penalty=-1.5)
    assert got[8] == LOGITS[8] + 1.5


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_all_tokens(
    penalized: Penalized,
) -> None:
    got = penalized((6, 5, 5, 0), repetition_penalty=2.0)
    expected = LOGITS.clone()
    expected[6], expected[5], expected[0] = -2.0, 0.75, 1.0
    torch.testing.assert_close(got, expected)


def test_penalties_of_one_row_leave_the_others_alone(ops: Ops) -> None:
    params = [
        SamplingParams(seed=0, temperature=0.0),
        SamplingParams(seed=0, temperature=0.0, presence_penalty=2.0),
    ]
    assert sample(ops, params, tokens=(3, 0)) == [0, 5]
