"""What a real server tells its operators: everything that happened, and nothing that was said."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_process import ServerProcess

KEY, WRONG_KEY = "sk-canary-key-4711", "sk-wrong-canary-4711"
PROMPT = "canary prompt 4711"
CANARIES = (KEY, WRONG_KEY, PROMPT, "canary", "4711")
FORGED = '\r\n{"event": "forged"}\x1b[31m'
TOP_K, LAYERS, EXPERTS = 2, 3, 4


def chat(text: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny-moe",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        **fields,
    }


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": PROMPT, "parameters": {"type": "object"}},
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": PROMPT}}}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": PROMPT}}}
BODIES: list[tuple[str, Any]] = [
    ("/chat/completions", chat()),
    ("/chat/completions", chat(stream=True)),
    ("/chat/completions", chat(n=2, stop=[PROMPT], user=PROMPT + FORGED, metadata={"a": PROMPT})),
    ("/chat/completions", chat(tools=[TOOL])),
    ("/chat/completions", chat(response_format=SCHEMA, max_tokens=40)),
    ("/chat/completions", chat(response_format=BAD_SCHEMA)),
    ("/chat/completions", chat(temperature=PROMPT)),
    ("/chat/completions", chat(tool_choice=PROMPT)),
    ("/chat/completions", chat(logit_bias={PROMPT: 1})),
    ("/chat/completions", chat(messages=[{"role": PROMPT, "content": PROMPT}])),
    ("/chat/completions", chat(messages=[{"role": "user", "content": [{"type": PROMPT}]}])),
    ("/chat/completions", chat(text=PROMPT * 1000)),
    ("/chat/completions", chat(text=PROMPT + "\ud800")),
    ("/chat/completions", PROMPT),
    ("/completions", {"model": "tiny-moe", "prompt": [PROMPT, PROMPT], "max_tokens": 2, "suffix": PROMPT}),
    ("/completions", {"model": "tiny-moe", "prompt": [PROMPT], "max_tokens": 2, "echo": True}),
    ("/responses", {"model": "tiny-moe", "input": PROMPT, "max_output_tokens": 16}),
    ("/responses", {"model": "tiny-moe", "input": PROMPT, "previous_response_id": PROMPT}),
    ("/messages", {"model": "tiny-moe", "messages": chat()["messages"], "max_tokens": 4}),
    ("/tokenize", {"prompt": PROMPT}),
    ("/embeddings", {"model": "tiny-moe", "input": PROMPT}),
]


@pytest.fixture
def server(start: Callable[..., ServerProcess]) -> ServerProcess:
    return start("--api-key", KEY).wait_until_ready()


def said_about_values(response: httpx2.Response) -> str:
    """An error without the name of its parameter, which may be a key that the caller made up."""
    error = response.json()["error"]
    return str(error).replace(str(error.get("param")), "")


def lines_of(server: ServerProcess, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.err.splitlines()]
    return [line for line in lines if line["event"] == event]


def wait_for_lines(server: ServerProcess, event: str, count: int) -> list[dict[str, Any]]:
    """Lines are written behind the answers that they are about."""
    deadline = time.monotonic() + 10
    while len(lines := lines_of(server, event)) < count:
        assert time.monotonic() < deadline, server.err
        time.sleep(0.02)
    return lines


def test_nothing_that_was_said_is_told(server: ServerProcess) -> None:
    refusals = []
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for path, body in BODIES:
            response = client.post(path, content=json.dumps(body))
            # What the compiler says about a schema is for its author, and may quote it.
            if response.status_code != 200 and "The grammar cannot be used" not in response.text:
                refusals.append(response)
        for content in (f'{{"messages": "{PROMPT}', f'{{"{PROMPT}": 1}}', f'["{PROMPT}"]'):
            refusals.append(client.post("/chat/completions", content=content))
        refusals.append(client.get(f"/{PROMPT}"))
        refusals.append(client.post("/chat/completions", json=chat(model="other" + FORGED)))
        odd = {"x-request-id": f'{PROMPT}", "event": "forged', "user-agent": PROMPT, "referer": PROMPT}
        refusals.append(client.post("/chat/completions", json=chat(temperature=9), headers=odd))
        wrong = {"Authorization": f"Bearer {WRONG_KEY}", "x-api-key": WRONG_KEY}
        refusals += [client.post(path, json=chat(), headers=wrong) for path in ("/completions", "/messages")]
        with client.stream("POST", "/chat/completions", json=chat(stream=True, max_tokens=4000)) as response:
            next(response.iter_lines())  # and then leaves
        requests = wait_for_lines(server, "request", len(BODIES) + 9)
        metrics = client.get(f"{server.root}/metrics").text
    assert len(refusals) >= 18
    assert all(400 <= response.status_code < 502 for response in refusals)
    told = [server.err, metrics, *map(said_about_values, refusals)]
    for canary in CANARIES:
        for text in told:
            assert canary not in text.replace(server.out, ""), text
    assert not lines_of(server, "forged")
    assert "\x1b" not in server.err
    assert len(requests) == len(BODIES) + 9
    outcomes = [line["outcome"] for line in requests]
    assert outcomes.count("cancelled") == 1
    assert "failed" not in outcomes
    (left,) = [line for line in requests if line["outcome"] == "cancelled"]
    (aborted,) = wait_for_lines(server, "request aborted", 1)  # by the engine, which has the same name for it
    assert left["request_id"] == aborted["request_id"]
    assert left["client_left"]
    assert left["status"] == 200


def settled_metrics(client: httpx2.Client, server: ServerProcess, generated_tokens: int) -> str:
    """The page as soon as the engine has told of its last step; a busy one may miss a scrape."""
    deadline = time.monotonic() + 20
    while True:
        page = client.get(f"{server.root}/metrics").text
        told = re.search(r"(?m)^toptwo:generation_tokens_total\S* (\S+)$", page)
        if (told and float(told[1]) == generated_tokens) or time.monotonic() > deadline:
            return page
        time.sleep(0.2)


def test_experts_are_counted(server: ServerProcess) -> None:
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert client.get(f"{server.root}/metrics", headers={"Authorization": ""}).status_code == 401
        for _ in range(2):  # the second one's prompt is cached
            usage = client.post("/chat/completions", json=chat("hello " * 20)).json()["usage"]
        page = settled_metrics(client, server, 2 * usage["completion_tokens"])
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    counts = {
        (sample.labels["layer"], sample.labels["expert"]): int(sample.value)
        for sample in samples
        if sample.name == "toptwo:expert_tokens_total"
    }
    assert len(counts) == LAYERS * EXPERTS
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    # The last token of an answer is never computed.
    computed = 2 * (usage["prompt_tokens"] + usage["completion_tokens"] - 1) - cached
    for layer in range(LAYERS):
        assert sum(count for (at, _), count in counts.items() if at == str(layer)) == computed * TOP_K
    values = {sample.name: sample.value for sample in samples if not set(sample.labels) - {"model_name"}}
    assert values["toptwo:prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert values["toptwo:generation_tokens_total"] == 2 * usage["completion_tokens"]
    assert values["toptwo:prefix_cache_hits_total"] == cached
    assert values["toptwo:num_requests_running"] == values["toptwo:num_requests_waiting"] == 0
    assert values["toptwo:kv_cache_usage_perc"] == 0
    assert values["toptwo:step_seconds_count"] > 0
