"""GET /metrics: who may read it, and that it balances with what callers were told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat, engine_info, served_model
from toptwo.api.health import Lifecycle
from toptwo.api.security import KeyRing
from toptwo.app import AppOptions, create_app
from toptwo.messages import GenerateRequest
from toptwo.settings import MetricsAccess
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"
ENDPOINT = "/chat/completions"  # whatever prefix it was called by
BEARER = [("authorization", f"Bearer {KEY}")]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(app: FastAPI) -> Samples:
    """Every sample by name and labels, but for the model's name, which must be there."""
    call = AsgiCall("GET", "/metrics", BEARER)
    await call.run(app)
    assert call.status == 200
    assert call.answer_headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: Samples = {}
    for family in text_string_to_metric_families(call.answer.decode()):
        for sample in family.samples:
            if sample.name.startswith("toptwo:"):
                assert sample.labels.pop("model_name") == "org/tiny-moe"
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples of the name that have these labels."""
    return sum(v for (n, given), v in samples.items() if n == name and labels.items() <= dict(given).items())


@pytest.mark.parametrize(
    ("access", "without", "with_key"), [("key", 401, 200), ("open", 200, 200), ("off", 401, 404)]
)
async def test_who_may_read_it(access: MetricsAccess, without: int, with_key: int) -> None:
    keys = KeyRing.from_keys([KEY])
    app = create_app(
        FakeEngine(), served_model(), FakeGrammars(), keys, Lifecycle(), AppOptions(metrics=access)
    )
    for headers, status in (
        ([], without),
        (BEARER, with_key),
        ([("authorization", "Bearer wrong")], without),
    ):
        call = AsgiCall("GET", "/metrics", headers)
        await call.run(app)
        assert call.status == status


async def test_it_is_there_while_the_engine_is_not(app: FastAPI, engine: FakeEngine) -> None:
    assert total(await scrape(app), "toptwo:engine_up") == 1
    engine.info, engine.num_restarts = None, 3
    samples = await scrape(app)
    assert total(samples, "toptwo:engine_up") == 0
    assert total(samples, "toptwo:engine_restarts_total") == 3


async def leave(app: FastAPI, engine: FakeEngine, body: object) -> None:
    engine.started.clear()
    call = AsgiCall.post_json(URL, body, BEARER)
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(engine.started.wait(), 5)
    call.leave()
    await asyncio.wait_for(running, 5)


async def test_requests_balance(
    app: FastAPI, http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    """What was taken on was completed, failed or was cancelled, and the tokens are those of the answers."""
    usages: list[dict[str, Any]] = []
    for body in (chat(), chat(n=3), chat(messages=[{"role": "user", "content": "a longer hello"}])):
        usages.append((await http.post(URL, json=body)).json()["usage"])
    completions = {"model": model.name, "prompt": ["hello", "wo"]}
    usages.append((await http.post("/v1/completions", json=completions)).json()["usage"])
    await http.post(URL, json=chat(stream=True))
    usages.append(usages[0])  # of the same request
    assert (await http.post(URL, json=chat(model="another"))).status_code == 404
    assert (await http.post("/v1/nothing")).status_code == 404
    await http.get("/v1/models")
    plain = engine.script
    for stream in (False, True):
        engine.script = Script(token_ids=[65], finish="error", error="on purpose")
        await http.post(URL, json=chat(stream=stream))
        engine.script = Script(token_ids=[65, 66], hang_after=1)
        await leave(app, engine, chat(stream=stream))
    scripts = iter([plain, Script(raises=ValueError("on purpose"))])
    engine.script_of = lambda request: next(scripts)
    await http.post(URL, json=chat(n=2))

    samples = await scrape(app)
    requests = "toptwo:http_requests_total"
    assert total(samples, requests, endpoint=ENDPOINT) == 10
    assert total(samples, requests, endpoint=ENDPOINT, outcome="completed") == 4
    assert total(samples, requests, endpoint=ENDPOINT, outcome="failed") == 3
    assert total(samples, requests, endpoint=ENDPOINT, outcome="cancelled") == 2
    assert total(samples, requests, endpoint=ENDPOINT, outcome="refused", status="404") == 1
    assert total(samples, requests, endpoint="/completions", outcome="completed") == 1
    assert total(samples, requests, endpoint="other", status="404") == 1
    assert total(samples, "toptwo:e2e_request_latency_seconds_count") == 5
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    assert total(samples, "toptwo:request_prompt_tokens_sum") == prompts
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert total(samples, "toptwo:request_generation_tokens_sum") == generated
    ended = "toptwo:request_success_total"
    assert total(samples, ended, finished_reason="stop") >= 8
    assert total(samples, ended, finished_reason="abort") >= 2
    assert total(samples, ended, finished_reason="error") >= 3
    assert total(samples, ended) == 8 + 2 + 2 + 2


async def test_a_line_and_an_engine_request_have_the_same_name(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.num_cached_tokens = 3
    with capture_logs() as lines:
        given = await http.post(URL, json=chat(), headers={"x-request-id": "my-own.id_1"})
        made = await http.post(URL, json=chat(), headers={"x-request-id": "not sane\x1b[31m"})
    assert given.headers["x-request-id"] == "my-own.id_1"
    assert made.headers["x-request-id"].startswith("req_")
    ids = [given.headers["x-request-id"], made.headers["x-request-id"]]
    assert [request.log_name for request in engine.requests] == ids
    lines = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in lines] == ids
    usage = given.json()["usage"]
    assert lines[0]["endpoint"] == ENDPOINT
    assert lines[0]["prompt_tokens"] == usage["prompt_tokens"]
    assert lines[0]["completion_tokens"] == usage["completion_tokens"]
    assert lines[0]["cached_tokens"] == 3
    assert lines[0]["finish_reason"] == "stop"
    assert lines[0]["key"] == KeyRing.from_keys([KEY]).verify(KEY)
    assert 0 <= lines[0]["ttft_seconds"] <= lines[0]["seconds"]


async def test_latencies_are_measured(app: FastAPI, http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(token_ids=[65] * 5, pause=0.02, finish="length")
    await http.post(URL, json=chat())
    samples = await scrape(app)
    assert total(samples, "toptwo:time_to_first_token_seconds_sum") >= 0.02
    assert total(samples, "toptwo:inter_token_latency_seconds_count") == 4
    assert 0.08 <= total(samples, "toptwo:inter_token_latency_seconds_sum") <= 10
    assert total(samples, "toptwo:e2e_request_latency_seconds_sum") >= 0.1


async def test_a_request_that_waited_too_long_has_failed(app: FastAPI, engine: FakeEngine) -> None:
    def overload(request: GenerateRequest) -> Script:
        return Script(finish="overload")

    engine.script_of = overload
    call = AsgiCall.post_json(URL, chat(), BEARER)
    await call.run(app)
    assert call.status == 503
    samples = await scrape(app)
    assert total(samples, "toptwo:request_success_total", finished_reason="overload") == 1
    assert total(samples, "toptwo:http_requests_total", outcome="failed", status="503") == 1
    assert engine.info == engine_info()
