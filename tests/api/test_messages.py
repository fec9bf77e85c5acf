"""Messages: Anthropic's format, translated to a conversation and back, and errors in its manner."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from fakes import CHATML, KEY, AsgiCall, FakeEngine, Script, chat_tokenizer, engine_info
from toptwo.text.model import ServedModel
from toptwo.text.template import ChatTemplate

URL = "/v1/messages"
BEARER = [("authorization", f"Bearer {KEY}")]
USER = {"role": "user", "content": "hello"}
INPUT = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOLS = [
    {"name": "weather", "description": "Of a city.", "input_schema": INPUT},
    {"type": "custom", "name": "clock", "input_schema": {"type": "object"}},
]
TWO_CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
)
THOUGHT = "<think>\nhell\n</think>\n\nhello<|im_end|>"


def ask(**fields: object) -> dict[str, object]:
    """A valid request, with the fields added."""
    return {"model": "org/tiny-moe", "max_tokens": 500, "messages": [USER], **fields}


async def answer(http: httpx2.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await http.post(URL, json=ask(**fields))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert list(found) == [
        "id",
        "type",
        "role",
        "model",
        "content",
        "stop_reason",
        "stop_sequence",
        "usage",
    ]
    assert found["id"].startswith("msg_")
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "org/tiny-moe")
    return found


async def stream(http: httpx2.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    response = await http.post(URL, json=ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream's events, in the way that the format is documented."""
    first, *middle, end, stop = events
    assert (first["type"], end["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Any] = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    partial = ""
    for event in middle:
        index = event["index"]
        match event["type"]:
            case "content_block_start":
                assert index == len(message["content"])
                message["content"].append(event["content_block"])
                partial = ""
            case "content_block_delta":
                assert index == len(message["content"]) - 1
                delta, block = event["delta"], message["content"][index]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "input_json_delta":
                        partial += delta["partial_json"]
            case "content_block_stop":
                if message["content"][index]["type"] == "tool_use":
                    message["content"][index]["input"] = json.loads(partial)
            case other:
                pytest.fail(other)
    return {**message, **end["delta"], "usage": {**message["usage"], **end["usage"]}}


def says(engine: FakeEngine, model: ServedModel, text: str, **fields: Any) -> None:
    """Make the engine say the text."""
    engine.script = Script(token_ids=model.tokenizer.encode([text]), **fields)


def prompt_of(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.requests[-1].prompt_ids)


def turns(*pairs: tuple[str, str]) -> str:
    """A prompt in the model's template."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in pairs)
    return text + "<|im_start|>assistant\n"


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content}


async def test_an_answer(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    engine.script.num_cached_tokens = 16
    message = await answer(http)
    assert message["content"] == [{"type": "text", "text": "hello wo"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    num_prompt = len(engine.requests[0].prompt_ids)
    assert message["usage"] == {
        "input_tokens": num_prompt - 16,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 16,
        "output_tokens": 3,
    }
    assert put_together(await stream(http)) | {"id": ""} == message | {"id": ""}


@pytest.mark.parametrize("prefix", ["/v3/openai", "/openai/v1", "/v1"])
async def test_every_prefix(http: httpx2.AsyncClient, prefix: str) -> None:
    assert (await http.post(f"{prefix}/messages", json=ask())).status_code == 200
    assert (await http.post(f"{prefix}/messages/count_tokens", json=ask())).status_code == 200


async def test_what_the_engine_is_asked_for(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    await answer(
        http,
        max_tokens=7,
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "c", "citations": None}]},
            {"role": "user", "content": "d"},
        ],
        temperature=0,
        top_p=0.5,
        top_k=3,
        stop_sequences=["zz"],
    )
    (request,) = engine.requests
    assert request.max_tokens == 7
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert prompt_of(engine, model) == turns(
        ("system", "Be brief.\nBe kind."), ("user", "a\nb"), ("assistant", "c"), ("user", "d")
    )


async def test_how_answers_end(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    message = await answer(http, stop_sequences=["o w"])
    assert message["content"][0]["text"] == "hell"
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "o w")
    says(engine, model, "hello", finish="length")
    assert (await answer(http))["stop_reason"] == "max_tokens"
    engine.script = Script()
    assert (await answer(http))["content"] == []


async def test_calls_are_blocks(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    says(engine, model, TWO_CALLS)
    message = await answer(http, tools=TOOLS)
    text, weather, clock = message["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (weather["type"], weather["name"], weather["input"]) == ("tool_use", "weather", {"city": "Łódź"})
    assert (clock["type"], clock["name"], clock["input"]) == ("tool_use", "clock", {})
    assert weather["id"] != clock["id"]
    assert weather["id"].startswith("toolu_")
    assert message["stop_reason"] == "tool_use"
    assert '"default": null' in prompt_of(engine, model)
    assert without_ids(put_together(await stream(http, tools=TOOLS))) == without_ids(message)


async def test_a_call_that_was_cut_short_has_no_input(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    says(engine, model, TWO_CALLS[: TWO_CALLS.index("Łódź")], finish="length")
    message = await answer(http, tools=TOOLS)
    assert message["content"][-1]["input"] == {}
    assert message["stop_reason"] == "max_tokens"


async def test_calls_can_be_sent_back(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    says(engine, model, TWO_CALLS)
    message = await answer(http, tools=TOOLS)
    _, weather, clock = message["content"]
    results = [
        {"type": "tool_result", "tool_use_id": weather["id"], "content": "no map", "is_error": True},
        {
            "type": "tool_result",
            "tool_use_id": clock["id"],
            "content": [{"type": "text", "text": "noon"}],
        },
        {"type": "text", "text": "Go on."},
    ]
    said = {"role": "assistant", "content": message["content"]}
    await answer(http, tools=TOOLS, messages=[USER, said, {"role": "user", "content": results}])
    prompt = prompt_of(engine, model)
    assert prompt.count("<|im_start|>assistant") == 2
    parts = ["Let me see.", '"city": "Łódź"', "Error: no map", "noon", "Go on."]
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("choice", "told", "forced"),
    [
        ({"type": "auto"}, {"weather", "clock"}, False),
        ({"type": "none"}, set(), False),
        ({"type": "any"}, {"weather", "clock"}, True),
        ({"type": "tool", "name": "clock"}, {"clock"}, True),
    ],
)
async def test_choices_of_tools(
    http: httpx2.AsyncClient,
    engine: FakeEngine,
    model: ServedModel,
    choice: object,
    told: set[str],
    forced: bool,
) -> None:
    await answer(http, tools=TOOLS, tool_choice=choice)
    prompt = prompt_of(engine, model)
    assert {name for name in ("weather", "clock") if f'"{name}"' in prompt} == told
    assert (engine.requests[0].grammar is not None) == forced


async def test_one_call_at_a_time(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    says(engine, model, TWO_CALLS, pause=0.001)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = await answer(http, tools=TOOLS, tool_choice=choice)
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["stop_reason"] == "tool_use"


async def test_counting(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    for fields in ({}, {"system": "Be brief.", "tools": TOOLS, "tool_choice": {"type": "any"}}):
        await answer(http, **fields)
        asked = {key: value for key, value in ask(**fields).items() if key != "max_tokens"}
        response = await http.post(f"{URL}/count_tokens", json=asked)
        assert response.json() == {"input_tokens": len(engine.requests[-1].prompt_ids)}
    engine.info = engine_info(max_model_len=4)
    response = await http.post(f"{URL}/count_tokens", json=ask(temperature=1))
    assert response.json()["input_tokens"] > 4
    assert response.headers["x-toptwo-ignored"] == "max_tokens, temperature"


NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"


class TestThoughts:
    @pytest.fixture
    def model(self) -> ServedModel:
        tokenizer = chat_tokenizer()
        template = ChatTemplate(CHATML + NO_THOUGHT, tokenizer.named_tokens)
        return ServedModel("org/tiny-moe", 1_700_000_000, tokenizer, template)

    @pytest.mark.parametrize("kind", ["enabled", "adaptive"])
    async def test_thoughts_are_blocks(
        self, http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel, kind: str
    ) -> None:
        says(engine, model, THOUGHT)
        thinking = {"type": kind, "budget_tokens": 1024}
        message = await answer(http, thinking=thinking)
        thought = {"type": "thinking", "thinking": "hell", "signature": ""}
        assert message["content"] == [thought, {"type": "text", "text": "hello"}]
        assert not prompt_of(engine, model).endswith("</think>\n")
        assert put_together(await stream(http, thinking=thinking)) | {"id": ""} == message | {"id": ""}
        said = {"role": "assistant", "content": message["content"]}
        await answer(http, messages=[USER, said, USER], thinking=thinking)
        response = await http.post(URL, json=ask(thinking=thinking))
        assert response.headers["x-toptwo-ignored"] == "thinking.budget_tokens"

    @pytest.mark.parametrize("fields", [{}, {"thinking": {"type": "disabled"}}])
    async def test_nobody_gets_thoughts_unasked(
        self,
        http: httpx2.AsyncClient,
        engine: FakeEngine,
        model: ServedModel,
        fields: dict[str, object],
    ) -> None:
        says(engine, model, THOUGHT)
        message = await answer(http, **fields)
        assert message["content"] == [{"type": "text", "text": "hello"}]
        assert prompt_of(engine, model).endswith("</think>\n")
        assert put_together(await stream(http, **fields)) | {"id": ""} == message | {"id": ""}


async def test_a_model_that_cannot_think(http: httpx2.AsyncClient) -> None:
    response = await http.post(URL, json=ask(thinking={"type": "enabled", "budget_tokens": 1024}))
    assert response.status_code == 400
    assert "cannot think" in response.json()["error"]["message"]
    for kind in ("adaptive", "disabled"):
        assert (await http.post(URL, json=ask(thinking={"type": kind}))).status_code == 200


async def test_either_header_brings_the_key(stranger: httpx2.AsyncClient, engine: FakeEngine) -> None:
    version = {"anthropic-version": "2023-06-01", "anthropic-beta": "some-beta"}
    good = [{"x-api-key": KEY, **version}, {"authorization": f"Bearer {KEY}"}]
    for headers in good:
        for path in (URL, f"{URL}/count_tokens"):
            assert (await stranger.post(path, json=ask(), headers=headers)).status_code == 200
    assert engine.requests[0].cache_scope == engine.requests[1].cache_scope
    assert len(engine.requests[0].cache_scope) == 16
    many = httpx2.Headers([("x-api-key", KEY), ("x-api-key", KEY)])
    bad = [{}, {"x-api-key": ""}, {"x-api-key": "wrong", "authorization": f"Bearer {KEY}"}]
    for refused in [*bad, {"authorization": "Bearer wrong"}, {"authorization": KEY}, many]:
        response = await stranger.post(URL, json=ask(), headers=refused)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        body = response.json()
        assert list(body) == ["type", "error"]
        assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        assert KEY not in response.text
    assert (await stranger.get("/v1/models", headers={"x-api-key": KEY})).status_code == 401


def message(**fields: object) -> dict[str, object]:
    """A request whose first message is this one."""
    return ask(messages=[fields, USER])


def block(role: str = "user", **fields: object) -> dict[str, object]:
    """A request whose first message holds this block."""
    return message(role=role, content=[fields])


DEEP: object = []
for _ in range(70):
    DEEP = [DEEP]

CASES = [
    ({"model": "org/tiny-moe", "messages": [USER]}, "max_tokens"),
    ({"model": "org/tiny-moe", "max_tokens": 5}, "messages"),
    (ask(messages=[]), "messages"),
    (ask(messages="a"), "messages"),
    (ask(messages=DEEP), "nested"),
    (ask(messages=[USER, {"role": "assistant", "content": "a"}]), "prefilled"),
    (message(role="system", content="a"), "messages[0].role"),
    (message(role="user"), "messages[0].content"),
    (message(role="user", content=[]), "messages[0].content"),
    (message(role="user", content="a", name="b"), "messages[0].name"),
    (block(type="image", source={}), "'image' is not supported"),
    (block(type="document", source={}), "'document' is not supported"),
    (block(type="alien"), "messages[0].content[0].type"),
    (block(type=5), "messages[0].content[0].type"),
    (block(type="text"), "messages[0].content[0].text"),
    (block(type="tool_use", id="a", name="b", input={}), "messages[0].content"),
    (block("assistant", type="tool_result", tool_use_id="a"), "messages[0].content"),
    (block("assistant", type="tool_use", id="a", name="b", input=[]), "messages[0].content[0].input"),
    (block("assistant", type="tool_use", name="b", input={}), "messages[0].content[0].id"),
    (block(type="tool_result", content="a"), "messages[0].content[0].tool_use_id"),
    (
        block(type="tool_result", tool_use_id="a", content=[{"type": "image", "source": {}}]),
        "messages[0].content[0].content[0].type",
    ),
    (ask(max_tokens=0), "max_tokens"),
    (ask(max_tokens=2048), "maximum context length"),
    (ask(temperature=1.1), "temperature"),
    (ask(top_k=-1), "top_k"),
    (ask(stop_sequences="a"), "stop_sequences"),
    (ask(stop_sequences=[""]), "stop_sequences[0]"),
    (ask(stop_sequences=["a"] * 5), "stop_sequences"),
    (ask(system=5), "system"),
    (ask(system=[{"type": "image"}]), "system[0].type"),
    (ask(tools=[{"type": "web_search_20250305", "name": "web_search"}]), "tools[0].type"),
    (ask(tools=[{"name": "f"}]), "tools[0].input_schema"),
    (ask(tools=[{"name": "f g", "input_schema": {}}]), "tools[0].name"),
    (ask(tools=[TOOLS[0], TOOLS[0]]), "tools"),
    (ask(tool_choice={"type": "any"}), "tool_choice"),
    (ask(tools=TOOLS, tool_choice={"type": "tool"}), "tool_choice.name"),
    (ask(tools=TOOLS, tool_choice={"type": "tool", "name": "x"}), "tool_choice"),
    (ask(tools=TOOLS, tool_choice={"type": "required"}), "tool_choice.type"),
    (ask(thinking={"type": "odd"}), "thinking.type"),
    (ask(mcp_servers=[{}]), "mcp_servers"),
    (ask(output_config={"format": {}}), "output_config"),
    (ask(n=2), "'n'"),
]


@pytest.mark.parametrize(("body", "named"), CASES)
async def test_mistakes_are_explained(
    http: httpx2.AsyncClient, engine: FakeEngine, body: dict[str, object], named: str
) -> None:
    response = await http.post(URL, json=body)
    assert response.status_code == 400
    found = response.json()
    assert list(found) == ["type", "error"]
    assert found["error"]["type"] == "invalid_request_error"
    assert named in found["error"]["message"], found
    assert engine.requests == []


async def test_other_errors_have_their_kinds(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    response = await http.post(URL, json=ask(model="other"))
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    response = await http.post(URL, content=b"{")
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    response = await http.post(URL, content=b" " * (9 * 1024 * 1024))
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")
    engine.script = Script(token_ids=[65], finish="error", error="Lost.")
    response = await http.post(URL, json=ask())
    assert response.status_code == 500
    assert response.json() == {"type": "error", "error": {"type": "api_error", "message": "Lost."}}
    engine.info = None
    response = await http.post(URL, json=ask())
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    assert response.headers["retry-after"]


async def test_harmless_fields_are_named_to_the_caller(http: httpx2.AsyncClient) -> None:
    body = ask(
        metadata={"user_id": "u"}, service_tier="auto", output_config={"effort": "low"}, container=None
    )
    response = await http.post(URL, json=body)
    assert response.status_code == 200
    assert response.headers["x-toptwo-ignored"] == "metadata, service_tier, output_config"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (Script(token_ids=[65, 66], finish="error", error="Lost."), "Lost."),
        (Script(token_ids=[65, 66, 67], raises=RuntimeError("secret"), raises_after=2), "The model failed"),
    ],
)
async def test_a_failure_in_the_middle_ends_the_stream(
    http: httpx2.AsyncClient, engine: FakeEngine, script: Script, sentence: str
) -> None:
    engine.script = script
    script.pause = 0.001
    *events, error = await stream(http)
    assert (error["type"], error["error"]["type"]) == ("error", "api_error")
    assert error["error"]["message"].startswith(sentence)
    text = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert text == "bc"


@pytest.mark.parametrize("is_stream", [False, True])
async def test_leaving_aborts(app: FastAPI, engine: FakeEngine, is_stream: bool) -> None:
    engine.script = Script(token_ids=[65] * 9, hang_after=2)
    call = AsgiCall.post_json(URL, ask(stream=is_stream), BEARER)
    running = asyncio.create_task(call.run(app))
    await asyncio.wait_for(engine.started.wait(), 5)
    call.leave()
    await asyncio.wait_for(running, 5)
    assert engine.num_open == 0
    assert engine.aborted == [engine.requests[0].request_id]
