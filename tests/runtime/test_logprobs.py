"""Reports on how likely tokens are: right, and the same in any company, chunking and preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import schedules
from schedules import Run, strangers
from tiny import forward_all, write_mixtral
from toptwo.messages import GenerateRequest, LogprobsWanted, TokenLogprobs
from toptwo_kernels.registry import BACKENDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_mixtral(directory)
    return directory


def wanted(**logprobs: int) -> GenerateRequest:
    request = schedules.request("it", seed=7, temperature=0.9, logit_bias={5: 4.0}, presence_penalty=1.0)
    return msgspec.structs.replace(request, logprobs=LogprobsWanted(**logprobs))


def run(checkpoint: Path, *requests: GenerateRequest, **options: Any) -> Run:
    return schedules.run(checkpoint, list(requests), **{"backend": "cpu", **options})


def check(report: TokenLogprobs, token: int, logits_V: torch.Tensor, num_top: int) -> None:
    expected_V = logits_V.double().log_softmax(-1)
    assert report.logprob == pytest.approx(float(expected_V[token]), abs=1e-4)
    best = expected_V.sort(descending=True, stable=True)
    assert report.top_logprobs == pytest.approx(best.values[:num_top].tolist(), abs=1e-4)
    assert len(set(report.top_ids)) == num_top
    assert [float(expected_V[i]) for i in report.top_ids] == pytest.approx(report.top_logprobs, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generated_tokens_are_judged_by_the_model_alone(checkpoint: Path, backend: str) -> None:
    """Before bias, penalties and temperature."""
    got = run(checkpoint, wanted(output=5), backend=backend)
    assert len(got.logprobs["it"]) == len(got.tokens["it"]) == 24
    for report, token, logits in zip(got.logprobs["it"], got.tokens["it"], got.logits["it"], strict=True):
        check(report, token, logits, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_is_judged_token_by_token(checkpoint: Path, backend: str) -> None:
    request = wanted(prompt=3)
    got = run(checkpoint, request, backend=backend)
    logits_TV = forward_all(checkpoint, request.prompt_ids, backend=backend)
    assert len(got.prompt_logprobs["it"]) == len(request.prompt_ids) - 1
    for report, token, logits in zip(
        got.prompt_logprobs["it"], request.prompt_ids[1:], logits_TV, strict=False
    ):
        check(report, token, logits, 3)


def test_reports_do_not_depend_on_company_chunks_or_preemption(checkpoint: Path) -> None:
    request = wanted(output=2, prompt=2)
    alone = run(checkpoint, request)
    crowd = run(checkpoint, *strangers(), request, max_step_tokens=47)
    older = [schedules.request(f"s{i}", seed=i, length=40, max_tokens=60) for i in range(3)]
    squeezed = run(checkpoint, *older, request, num_blocks=16)
    assert "it" in squeezed.preempted
    for other in (crowd, squeezed):
        assert other.tokens["it"] == alone.tokens["it"]
        assert other.logprobs["it"] == alone.logprobs["it"]
        assert other.prompt_logprobs["it"] == alone.prompt_logprobs["it"]


def test_a_judged_prompt_takes_nothing_from_the_cache_and_gives_to_it(checkpoint: Path) -> None:
    plain = msgspec.structs.replace(wanted(), request_id="first")
    later = msgspec.structs.replace(wanted(), request_id="last")
    got = schedules.run(checkpoint, [plain], [wanted(prompt=0)], [later], backend="cpu")
    assert got.cached == {"first": 0, "it": 0, "last": 48}
    assert len(got.prompt_logprobs["it"]) == 59
    assert got.tokens["it"] == got.tokens["last"]


def test_nobody_gets_reports_unasked(checkpoint: Path) -> None:
    got = run(checkpoint, wanted(), msgspec.structs.replace(wanted(output=1), request_id="asks"))
    assert got.logprobs["it"] == got.prompt_logprobs["it"] == []
    assert len(got.logprobs["asks"]) == 24
