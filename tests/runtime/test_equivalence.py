"""One request, many ways to compute it: whole, in chunks, cached, preempted, in company. Same answer.

Bit by bit on the native backend; to rounding on the reference, whose sums depend on a step's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import schedules
from schedules import Run, strangers
from tiny import write_mixtral
from toptwo.messages import GenerateRequest
from toptwo.runtime import build
from toptwo_kernels.registry import BACKENDS


@dataclass(frozen=True)
class Model:
    """A checkpoint and what computes it."""

    directory: Path
    backend: str


def run(model: Model, *waves: list[GenerateRequest], **options: Any) -> Run:
    """Serve waves of requests one after the other on one engine of the model's backend."""
    return schedules.run(model.directory, *waves, backend=model.backend, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory)
    return directory


@pytest.fixture(params=BACKENDS)
def model(checkpoint: Path, request: pytest.FixtureRequest) -> Model:
    return Model(checkpoint, request.param)


@pytest.fixture(params=[{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "seeded"])
def wanted(request: pytest.FixtureRequest) -> GenerateRequest:
    return schedules.request("it", seed=7, **request.param)


@pytest.fixture
def alone(model: Model, wanted: GenerateRequest) -> Run:
    return run(model, [wanted])


def check_same(model: Model, got: Run, expected: Run) -> None:
    assert got.tokens["it"] == expected.tokens["it"]
    got_SV, expected_SV = torch.stack(got.logits["it"]), torch.stack(expected.logits["it"])
    if model.backend == "cpu":
        assert torch.equal(got_SV, expected_SV)
    else:
        torch.testing.assert_close(got_SV, expected_SV, atol=1e-5, rtol=0)


def test_chunked_prefill(model: Model, wanted: GenerateRequest, alone: Run) -> None:
    for budget in (32, 33, 47):
        check_same(model, run(model, [wanted], max_step_tokens=budget), alone)


def test_prefix_cached(model: Model, wanted: GenerateRequest, alone: Run) -> None:
    earlier = GenerateRequest("earlier", wanted.prompt_ids, wanted.sampling, 3)
    got = run(model, [earlier], [wanted])
    assert got.cached["it"] == 48
    check_same(model, got, alone)


def test_batched_with_strangers(model: Model, wanted: GenerateRequest, alone: Run) -> None:
    check_same(model, run(model, [*strangers(), wanted]), alone)
    check_same(model, run(model, [wanted, *strangers()], max_step_tokens=64), alone)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_and_resumed(
    model: Model, wanted: GenerateRequest, alone: Run, prefix_caching: bool
) -> None:
    """Three older sequences outgrow the pool while the wanted one, the youngest, is decoding."""
    company = [schedules.request(f"s{i}", seed=i, length=40, max_tokens=60) for i in range(3)]
    got = run(model, [*company, wanted], num_blocks=16, prefix_caching=prefix_caching)
    assert "it" in got.preempted
    check_same(model, got, alone)


def test_greedy_tokens_equal_transformers(model: Model) -> None:
    reference = write_mixtral(model.directory)
    wanted = schedules.request("it", seed=3, max_tokens=48)
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([wanted.prompt_ids]), max_new_tokens=48, do_sample=False, eos_token_id=None
        )
    assert run(model, [wanted]).tokens["it"] == expected[0, 60:].tolist()


def test_nothing_reads_kv_that_was_not_written(
    model: Model, wanted: GenerateRequest, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in unwritten cache memory, NaN included, must not reach a result."""
    allocate = build.allocate_kv_cache

    def poisoned(*args: Any) -> Any:
        return [(k.fill_(torch.nan), v.fill_(torch.nan)) for k, v in allocate(*args)]

    monkeypatch.setattr(build, "allocate_kv_cache", poisoned)
    check_same(model, run(model, [*strangers(6), wanted], max_step_tokens=48), alone)
