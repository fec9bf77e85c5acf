"""One request, many ways to compute it: whole, in chunks, cached, preempted, in company. Same answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import load_runner, write_mixtral
from toptwo.engine.blocks import BlockPool
from toptwo.engine.request import Sequence
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, Row, SamplingParams
from toptwo.runtime import build

MAX_LEN = 256


@dataclass
class Run:
    """What a set of requests got: tokens, and the logits each token was drawn from."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)


def run(
    directory: Path,
    *waves: list[GenerateRequest],
    num_blocks: int = 512,
    max_step_tokens: int = 512,
    prefix_caching: bool = True,
) -> Run:
    """Serve waves of requests one after the other on one engine."""
    runner = load_runner(directory, max_model_len=MAX_LEN, num_blocks=num_blocks)
    scheduler = Scheduler(
        SchedulerLimits(320, MAX_LEN, 32, max_step_tokens, prefix_caching), BlockPool(num_blocks, 16)
    )
    recorded: list[tuple[list[Row], torch.Tensor]] = []
    compute = runner.compute_logits

    def record(plan: object) -> object:
        logits, batch = compute(plan)
        recorded.append((batch.sampling_rows, logits.clone()))
        return logits, batch

    runner.compute_logits = record
    result = Run()
    preempt = scheduler._preempt

    def record_preemption(sequence: Sequence) -> None:
        if sequence.num_generated:
            result.preempted.add(sequence.request.request_id)
        preempt(sequence)

    scheduler._preempt = record_preemption  # type: ignore[method-assign]
    for wave in waves:
        for request in wave:
            assert scheduler.add(request) is None
        while plan := scheduler.plan():
            events = scheduler.apply(runner.execute(plan))
            for event, logits in zip(events, recorded.pop()[1], strict=True):
                result.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                result.logits.setdefault(event.request_id, []).append(logits)
                result.cached[event.request_id] = event.num_cached_tokens
    return result


def request(
    name: str, seed: int = 0, length: int = 60, max_tokens: int = 24, **sampling: float
) -> GenerateRequest:
    prompt = torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    params = SamplingParams(**{"seed": seed, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerateRequest(name, prompt, params, max_tokens)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory)
    return directory


@pytest.fixture(params=[{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "seeded"])
def wanted(request: pytest.FixtureRequest) -> GenerateRequest:
    return globals()["request"]("it", seed=7, **request.param)


@pytest.fixture
def alone(checkpoint: Path, wanted: GenerateRequest) -> Run:
    return run(checkpoint, [wanted])


def strangers(count: int = 16) -> Iterator[GenerateRequest]:
    for index in range(count):
        yield request(f"s{index}", seed=100 + index, length=5 + 11 * index, max_tokens=10 + 3 * index)


def check_same(got: Run, expected: Run) -> None:
    assert got.tokens["it"] == expected.tokens["it"]
    torch.testing.assert_close(
        torch.stack(got.logits["it"]), torch.stack(expected.logits["it"]), atol=1e-5, rtol=0
    )


def test_chunked_prefill(checkpoint: Path, wanted: GenerateRequest, alone: Run) -> None:
    for budget in (32, 33, 47):
        check_same(run(checkpoint, [wanted], max_step_tokens=budget), alone)


def test_prefix_cached(checkpoint: Path, wanted: GenerateRequest, alone: Run) -> None:
    earlier = GenerateRequest("earlier", wanted.prompt_ids, wanted.sampling, 3)
    got = run(checkpoint, [earlier], [wanted])
    assert got.cached["it"] == 48
    check_same(got, alone)


def test_batched_with_strangers(checkpoint: Path, wanted: GenerateRequest, alone: Run) -> None:
    check_same(run(checkpoint, [*strangers(), wanted]), alone)
    check_same(run(checkpoint, [wanted, *strangers()], max_step_tokens=64), alone)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_and_resumed(
    checkpoint: Path, wanted: GenerateRequest, alone: Run, prefix_caching: bool
) -> None:
    """Three older sequences outgrow the pool while the wanted one, the youngest, is decoding."""
    company = [request(f"s{i}", seed=i, length=40, max_tokens=60) for i in range(3)]
    got = run(checkpoint, [*company, wanted], num_blocks=16, prefix_caching=prefix_caching)
    assert "it" in got.preempted
    check_same(got, alone)


def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    reference = write_mixtral(checkpoint)
    wanted = request("it", seed=3, max_tokens=48)
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([wanted.prompt_ids]), max_new_tokens=48, do_sample=False, eos_token_id=None
        )
    assert run(checkpoint, [wanted]).tokens["it"] == expected[0, 60:].tolist()


def test_nothing_reads_kv_that_was_not_written(
    checkpoint: Path, wanted: GenerateRequest, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in unwritten cache memory, NaN included, must not reach a result."""
    allocate = build.allocate_kv_cache

    def poisoned(*args: Any) -> Any:
        return [(k.fill_(torch.nan), v.fill_(torch.nan)) for k, v in allocate(*args)]

    monkeypatch.setattr(build, "allocate_kv_cache", poisoned)
    check_same(run(checkpoint, [*strangers(6), wanted], max_step_tokens=48), alone)
