"""R8: whether a request was preempted cannot be told from its answer."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

import schedules
from reliability.figures import record
from reliability.live import MODEL, chat, checkpoint, client_of, serving
from toptwo.messages import GenerateRequest, Grammar, LogprobsWanted, SamplingParams
from toptwo.text.grammar import json_schema_grammar, regex_grammar

NUM_TOKENS = 260  # of the tiny model's vocabulary that are plain text
GRAMMARS = [
    regex_grammar("[a-f]{4}-[0-9 ]{30}-(yes|no)"),
    json_schema_grammar({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}),
]


def mixed(dice: random.Random, number: int, length: int, max_tokens: int) -> GenerateRequest:
    """Greedy and seeded, free and forced, with and without reports, at random."""
    sampling = SamplingParams(
        seed=number,
        temperature=dice.choice([0.0, 0.7, 1.2]),
        top_p=dice.choice([1.0, 0.9]),
        top_k=dice.choice([0, 40]),
        frequency_penalty=dice.choice([0.0, 0.5]),
        repetition_penalty=dice.choice([1.0, 1.2]),
        logit_bias=dice.choice([{}, {65: 2.0}]),
    )
    end = [257]  # <|im_end|> would do as well as any token that comes now and then
    grammar = dice.choice([None, None, *(Grammar(text, tuple(end)) for text in GRAMMARS)])
    logprobs = LogprobsWanted(output=dice.choice([None, 3]), prompt=dice.choice([None, None, None, 2]))
    prompt = [dice.randrange(NUM_TOKENS) for _ in range(length)]
    name = f"r{number}"
    stops = end if grammar else []  # what is free is as long as it may be
    return GenerateRequest(name, prompt, sampling, max_tokens, stops, grammar=grammar, logprobs=logprobs)


def differing(got: schedules.Run, alone: schedules.Run) -> list[str]:
    """Requests that got anything else than they get alone."""

    def of(run: schedules.Run, name: str) -> list[object]:
        return [kind.get(name) for kind in (run.tokens, run.ends, run.logprobs, run.prompt_logprobs)]

    return [name for name in alone.ends if of(got, name) != of(alone, name)]


@pytest.mark.parametrize("every", [0, 5])
@pytest.mark.parametrize("caching", [True, False])
def test_sixteen_requests_in_a_pool_for_four(caching: bool, every: int) -> None:
    dice = random.Random(8)
    wanted = [mixed(dice, number, length=20, max_tokens=60) for number in range(16)]
    options: dict[str, Any] = {"prefix_caching": caching}
    alone = schedules.run(checkpoint(), *([one] for one in wanted), **options)
    got = schedules.run(checkpoint(), wanted, num_blocks=4 * 5, preempt_every=every, **options)
    assert got.num_preemptions > 0
    assert set(got.ends) == {one.request_id for one in wanted}
    lost = differing(got, alone)
    assert not lost
    figure = f"{got.num_preemptions} preemptions, all as if alone, log-probabilities bit by bit"
    done = "16 requests in a KV pool for 4" + (", prefixes cached" if caching else "")
    done += f", one preempted every {every} steps" if every else ""
    record("R8", done, 1, len(lost), figure)


def test_a_thousand_requests_preempted_every_other_step() -> None:
    dice = random.Random(2)
    wanted = [mixed(dice, number, dice.randint(1, 60), dice.randint(1, 12)) for number in range(1000)]
    alone = schedules.run(checkpoint(), *([one] for one in wanted), prefix_caching=False)
    got = schedules.run(checkpoint(), wanted, num_blocks=64, preempt_every=2)
    assert got.num_preemptions > 50
    lost = differing(got, alone)
    assert not lost
    figure = f"{got.num_preemptions} preemptions, all as if alone"
    record("R8", "1,000 mixed requests, one preempted every 2 steps", 1, len(lost), figure)


async def answers(directory: Path, faults: str) -> list[Any]:
    """What 16 callers get at the same time, without what names and counts an answer."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 7, "n": 2},
        {"logprobs": True, "top_logprobs": 3},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
    ]
    calls = [chat(f"number {i}", max_tokens=60, **kinds[i % 4]) for i in range(16)]
    with serving(directory, "--max-model-len", "256", faults=faults) as server:
        async with client_of(server) as client:
            got = await asyncio.gather(*(client.post("/chat/completions", json=call) for call in calls))
    assert {answer.status_code for answer in got} == {200}
    assert {answer.json()["model"] for answer in got} == {MODEL}
    return [(answer.json()["choices"], answer.json()["usage"]["completion_tokens"]) for answer in got]


async def test_callers_cannot_tell(tmp_path: Path) -> None:
    plain = await answers(tmp_path / "plain", "slow@1")
    preempted = await answers(tmp_path / "preempted", "slow@1,preempt@3")
    lost = sum(one != other for one, other in zip(plain, preempted, strict=True))
    assert lost == 0
    record("R8", "16 callers over HTTP, one preempted every 3 steps", 1, lost, "all answers equal")
