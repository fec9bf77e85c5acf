"""Whole models on the CUDA backend: its step, padded and planned ahead, beside the reference backend's.

In float32, where rounding is far below the distance between two tokens' logits.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

import schedules
from cuda_harness import INTERPRETED
from schedules import Run, strangers
from tiny import FAMILIES, load_runner, write_mixtral
from toptwo.engine.blocks import BlockPool
from toptwo.engine.scheduler import Scheduler, SchedulerLimits
from toptwo.messages import GenerateRequest, StepResult


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory)
    return directory


def run(directory: Path, *waves: list[GenerateRequest], device: str = "cuda", **options: Any) -> Run:
    backend = "auto" if device == "cuda" else "reference"
    return schedules.run(directory, *waves, device=device, backend=backend, **options)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    FAMILIES[family].write(tmp_path)
    wanted = schedules.request("it", seed=3, length=21, max_tokens=5)
    expected, got = run(tmp_path, [wanted], device="cpu"), run(tmp_path, [wanted])
    assert got.tokens["it"] == expected.tokens["it"]
    largest = torch.stack(expected.logits["it"]).abs().max()
    difference = (torch.stack(got.logits["it"]).cpu() - torch.stack(expected.logits["it"])).abs().max()
    assert difference <= 2e-5 * largest


def test_company_chunks_and_preemption_change_nothing(checkpoint: Path) -> None:
    wanted = schedules.request("it", seed=7, length=37, max_tokens=6, temperature=0.8, top_p=0.9)
    alone = run(checkpoint, [wanted])
    company = [schedules.request(f"s{i}", seed=i, length=20 + i, max_tokens=6) for i in range(3)]
    got = run(checkpoint, [*company, wanted], max_step_tokens=48, preempt_every=3)
    assert got.num_preemptions
    assert got.tokens["it"] == alone.tokens["it"]


def test_steps_launched_ahead_give_the_same_tokens(checkpoint: Path) -> None:
    """The next step reads the tokens that the one before it drew where they are: on the device."""
    requests = [schedules.request(f"r{i}", seed=i, length=9 + i, max_tokens=5) for i in range(3)]
    expected = run(checkpoint, requests).tokens
    runner = load_runner(checkpoint, max_model_len=128, device="cuda")
    assert runner.overlaps
    scheduler = Scheduler(SchedulerLimits(schedules.VOCAB, 128, 32, 512), BlockPool(64, 16))
    for each in requests:
        assert scheduler.add(each) is None
    tokens: dict[str, list[int]] = {}
    launched: deque = deque()
    while scheduler.has_work:
        plan = scheduler.plan()
        if plan:
            launched.append(runner.launch(plan))
        while len(launched) > (1 if plan else 0):
            result: StepResult = launched.popleft()()
            for event in scheduler.apply(result):
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
    assert tokens == expected


def test_rows_are_the_same_bits_alone_and_together(checkpoint: Path) -> None:
    """Decode steps of one row, and the same row among strangers."""
    wanted = schedules.request("it", seed=5, length=17, max_tokens=4)
    alone = torch.stack(run(checkpoint, [wanted]).logits["it"])
    together = torch.stack(run(checkpoint, [*strangers(4), wanted]).logits["it"])
    assert torch.equal(alone[1:], together[1:])


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_mixed_requests_under_preemption_get_what_each_gets_alone(
    checkpoint: Path, quantization: str
) -> None:
    """In bfloat16, on a card a thousand of them: any bit that company or chunks changed would show."""
    requests = [
        schedules.request(
            f"r{i}", seed=i, length=1 + 13 * i % 60, max_tokens=1 + i % 6, temperature=(i % 3) / 2, top_p=0.9
        )
        for i in range(5 if INTERPRETED else 1000)
    ]
    options = {"dtype": "bfloat16", "quantization": quantization, "num_blocks": 256}
    alone = run(checkpoint, *([each] for each in requests), prefix_caching=False, **options)
    got = run(checkpoint, requests, max_step_tokens=64, preempt_every=3, **options)
    assert got.num_preemptions
    assert got.tokens == alone.tokens
