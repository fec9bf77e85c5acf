"""Responses: OpenAI's newer format, translated to a conversation and back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fakes import CHATML, KEY, AsgiCall, FakeEngine, FakeGrammars, Script, chat_tokenizer, engine_info
from toptwo.text.model import ServedModel
from toptwo.text.template import ChatTemplate

URL = "/v1/responses"
BEARER = [("authorization", f"Bearer {KEY}")]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOLS = [
    {"type": "function", "name": "weather", "description": "Of a city.", "parameters": PARAMETERS},
    {"type": "function", "name": "clock", "strict": True, "parameters": None},
]
TWO_CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
)
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def ask(**fields: object) -> dict[str, object]:
    """A valid request, with the fields added."""
    return {"model": "org/tiny-moe", "input": "hello", **fields}


async def respond(http: httpx2.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await http.post(URL, json=ask(**fields))
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    found: dict[str, Any] = response.json()
    return found


async def stream(http: httpx2.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    response = await http.post(URL, json=ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for number, block in enumerate(response.text.strip().split("\n\n")):
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event, strict=True)
        events.append(event)
    return events


def says(engine: FakeEngine, model: ServedModel, text: str, **fields: Any) -> None:
    """Make the engine say the text."""
    engine.script = Script(token_ids=model.tokenizer.encode([text]), **fields)


def prompt_of(engine: FakeEngine, model: ServedModel) -> str:
    return model.tokenizer.decode(engine.requests[-1].prompt_ids)


def turns(*pairs: tuple[str, str]) -> str:
    """A prompt in the model's template."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in pairs)
    return text + "<|im_start|>assistant\n"


async def test_the_official_client_gets_a_response(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await sdk.responses.create(model="org/tiny-moe", input="hello")
    assert answer.output_text == "hello wo"
    assert answer.status == "completed"
    assert answer.id.startswith("resp_")
    assert answer.usage
    assert answer.usage.input_tokens == len(engine.requests[0].prompt_ids)
    assert answer.usage.output_tokens == 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + 3


async def test_what_the_engine_is_asked_for(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    body = await respond(
        http,
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
            },
            {"type": "message", "role": "user", "content": "c"},
        ],
        max_output_tokens=7,
        temperature=0,
        top_p=0.5,
        metadata={"a": "b"},
    )
    (request,) = engine.requests
    assert request.max_tokens == 7
    assert (request.sampling.temperature, request.sampling.top_p) == (0, 0.5)
    assert prompt_of(engine, model) == turns(
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")
    )
    assert body["instructions"] == "Be brief."
    assert body["metadata"] == {"a": "b"}
    assert (body["temperature"], body["top_p"], body["max_output_tokens"]) == (0, 0.5, 7)
    assert (body["store"], body["previous_response_id"]) == (False, None)


async def test_the_events_come_in_openais_order(http: httpx2.AsyncClient) -> None:
    events = await stream(http)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == "hello wo"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert {e["response"]["id"] for e in events if "response" in e} == {events[0]["response"]["id"]}


async def test_the_official_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="org/tiny-moe", input="hello") as events:
        async for _ in events:
            pass
        final = await events.get_final_response()
    assert final.output_text == "hello wo"
    assert final.status == "completed"


async def test_an_answer_cut_short_is_incomplete(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    says(engine, model, "hello", finish="length", num_cached_tokens=5)
    body = await respond(http, max_output_tokens=1)
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 5
    events = await stream(http, max_output_tokens=1)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-2]["item"]["status"] == "incomplete"


async def test_calls_are_items(http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel) -> None:
    says(engine, model, TWO_CALLS)
    body = await respond(http, tools=TOOLS)
    message, *calls = body["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert [(call["type"], call["name"]) for call in calls] == [
        ("function_call", "weather"),
        ("function_call", "clock"),
    ]
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "Łódź"}, {}]
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    assert body["tools"][0]["parameters"] == PARAMETERS
    assert '"default": null' in prompt_of(engine, model)
    events = await stream(http, tools=TOOLS)
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        "message",
        "function_call",
        "function_call",
    ]
    for index in (1, 2):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["arguments"] == ""
        text = "".join(event["delta"] for event in own if event["type"].endswith("arguments.delta"))
        assert own[-2]["type"] == "response.function_call_arguments.done"
        assert text == own[-2]["arguments"] == own[-1]["item"]["arguments"]
        assert own[-1]["item"]["call_id"] == own[0]["item"]["call_id"]
        assert own[-1]["item"]["status"] == "completed"


async def test_calls_can_be_sent_back(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    says(engine, model, TWO_CALLS)
    output = (await respond(http, tools=TOOLS))["output"]
    results = [
        {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": output[2]["call_id"],
            "output": [{"type": "input_text", "text": "noon"}],
        },
    ]
    await respond(http, tools=TOOLS, input=[{"role": "user", "content": "hello"}, *output, *results])
    prompt = prompt_of(engine, model)
    assert prompt.count("<|im_start|>assistant") == 2  # the message with its calls, and the next one
    assert prompt.index("Let me see.") < prompt.index('"city": "Łódź"') < prompt.index("rain")
    assert prompt.index("rain") < prompt.index("noon")


@pytest.mark.parametrize(
    ("choice", "told", "forced"),
    [
        ("auto", {"weather", "clock"}, False),
        ("none", set(), False),
        ("required", {"weather", "clock"}, True),
        ({"type": "function", "name": "clock"}, {"clock"}, True),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]},
            {"clock"},
            False,
        ),
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
    body = await respond(http, tools=TOOLS, tool_choice=choice)
    assert body["tool_choice"] == choice
    prompt = prompt_of(engine, model)
    assert {name for name in ("weather", "clock") if f'"{name}"' in prompt} == told
    assert (engine.requests[0].grammar is not None) == forced


async def test_a_schema_is_kept_and_shown_again(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    form = {"type": "json_schema", "name": "city", "schema": PARAMETERS, "strict": True}
    body = await respond(http, text={"format": form, "verbosity": "medium"})
    assert body["text"]["format"] == form
    (request,) = engine.requests
    assert request.grammar
    assert '"default": null' in request.grammar.source
    await respond(http, text={"format": {"type": "json_object"}})
    assert engine.requests[1].grammar


async def test_reports_on_tokens(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    body = await respond(http, top_logprobs=1, include=["message.output_text.logprobs"])
    (part,) = body["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"]] == ["hello", " wo"]
    assert [len(one["top_logprobs"]) for one in part["logprobs"]] == [1, 1]
    events = await stream(http, top_logprobs=1)
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [one for logprobs in deltas for one in logprobs] == part["logprobs"]
    await respond(http, include=["reasoning.encrypted_content"])
    assert [request.logprobs.output for request in engine.requests] == [1, 1, None]


NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"


class TestThoughts:
    @pytest.fixture
    def model(self) -> ServedModel:
        tokenizer = chat_tokenizer()
        template = ChatTemplate(CHATML + NO_THOUGHT, tokenizer.named_tokens)
        return ServedModel("org/tiny-moe", 1_700_000_000, tokenizer, template)

    async def test_thoughts_are_items(
        self, http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
    ) -> None:
        says(engine, model, "<think>\nhell\n</think>\n\nhello<|im_end|>")
        body = await respond(http, reasoning={"effort": "low", "summary": "auto"})
        thought, message = body["output"]
        assert (thought["type"], thought["summary"]) == ("reasoning", [])
        assert thought["content"] == [{"type": "reasoning_text", "text": "hell"}]
        assert message["content"][0]["text"] == "hello"
        assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        assert body["reasoning"]["effort"] == "low"
        events = await stream(http)
        kinds = [e["type"] for e in events if e.get("output_index") == 0]
        assert list(dict.fromkeys(kinds)) == [
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
        ]
        assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]

    async def test_no_effort_is_no_thought(
        self, http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
    ) -> None:
        for effort, has_empty_thought in (("none", True), ("high", False), (None, False)):
            response = await http.post(URL, json=ask(reasoning={"effort": effort}))
            assert prompt_of(engine, model).endswith("</think>\n") == has_empty_thought
            ignored = response.headers.get("x-toptwo-ignored")
            assert ignored == ("reasoning.effort" if effort == "high" else None)


DEEP: object = []
for _ in range(70):
    DEEP = [DEEP]
USER = {"role": "user", "content": "hello"}


def item(**fields: object) -> dict[str, object]:
    """A request whose second item is this one."""
    return ask(input=[USER, fields])


def call_item(**fields: object) -> dict[str, object]:
    return item(**{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", **fields})


def form(**fields: object) -> dict[str, object]:
    return ask(text={"format": fields})


CASES: list[tuple[dict[str, object], str | None, str]] = [
    ({"model": "org/tiny-moe"}, "input", "missing_required_parameter"),
    ({"input": "a"}, "model", "missing_required_parameter"),
    (ask(input=5), "input", "invalid_type"),
    (ask(input=[]), "input", "invalid_value"),
    (ask(input=[5]), "input[0]", "invalid_type"),
    (ask(input=DEEP), None, "invalid_value"),
    (item(role="user"), "input[1].content", "missing_required_parameter"),
    (item(role="tool", content="x"), "input[1].role", "invalid_value"),
    (item(type="alien", role="user", content="x"), "input[1].type", "invalid_value"),
    (item(type="web_search_call", id="x"), "input[1].type", "unsupported_parameter"),
    (item(type="item_reference", id="x"), "input[1].type", "unsupported_parameter"),
    (item(type=5, role="user", content="x"), "input[1].type", "invalid_value"),
    (
        item(role="user", content=[{"type": "input_image", "image_url": "x"}]),
        "input[1].content[0].type",
        "unsupported_parameter",
    ),
    (
        item(role="user", content=[{"type": "input_text"}]),
        "input[1].content[0].text",
        "missing_required_parameter",
    ),
    (item(role="user", content=[]), "input[1].content", "invalid_value"),
    (call_item(arguments=5), "input[1].arguments", "invalid_type"),
    (call_item(arguments="[1"), "input", "invalid_value"),
    (call_item(call_id=""), "input[1].call_id", "invalid_value"),
    (item(type="function_call_output", output="x"), "input[1].call_id", "missing_required_parameter"),
    (ask(tools=[{"type": "web_search"}]), "tools[0].type", "unsupported_parameter"),
    (ask(tools=[{"type": "function"}]), "tools[0].name", "missing_required_parameter"),
    (ask(tools=[TOOLS[0], TOOLS[0]]), "tools", "invalid_value"),
    (
        ask(tools=[{"type": "function", "function": {"name": "f"}}]),
        "tools[0].function",
        "unknown_parameter",
    ),
    (ask(tool_choice="required"), "tool_choice", "invalid_value"),
    (ask(tool_choice="odd"), "tool_choice", "invalid_value"),
    (ask(tools=TOOLS, tool_choice={"type": "function"}), "tool_choice.name", "invalid_value"),
    (ask(tools=TOOLS, tool_choice={"type": "function", "name": "x"}), "tool_choice", "invalid_value"),
    (ask(tools=TOOLS, tool_choice={"type": "allowed_tools"}), "tool_choice.tools", "invalid_value"),
    (ask(tools=TOOLS, tool_choice={"type": "mcp"}), "tool_choice.type", "unsupported_parameter"),
    (form(type="json_schema", schema={}), "text.format.name", "missing_required_parameter"),
    (form(type="json_schema", name="n", schema=5), "text.format.schema", "invalid_type"),
    (form(type="odd"), "text.format.type", "invalid_value"),
    (ask(text={"verbosity": "low"}), "text.verbosity", "unsupported_parameter"),
    (ask(max_output_tokens=0), "max_output_tokens", "invalid_value"),
    (ask(max_output_tokens=2048), "input", "context_length_exceeded"),
    (ask(temperature=2.1), "temperature", "invalid_value"),
    (ask(top_logprobs=21), "top_logprobs", "invalid_value"),
    (ask(include=["odd"]), "include[0]", "invalid_value"),
    (ask(metadata={"a": 5}), "metadata.a", "invalid_type"),
    (ask(metadata={str(i): "" for i in range(17)}), "metadata", "invalid_value"),
    (ask(reasoning={"effort": "odd"}), "reasoning.effort", "invalid_value"),
    (ask(previous_response_id="resp_1"), "previous_response_id", "unsupported_parameter"),
    (ask(conversation="conv_1"), "conversation", "unsupported_parameter"),
    (ask(background=True), "background", "unsupported_parameter"),
    (ask(prompt={"id": "p"}), "prompt", "unsupported_parameter"),
    (ask(truncation="auto"), "truncation", "unsupported_parameter"),
    (ask(messages=[]), "messages", "unknown_parameter"),
    (ask(model="other"), "model", "model_not_found"),
]


@pytest.mark.parametrize(("body", "param", "code"), CASES)
async def test_mistakes_are_explained(
    http: httpx2.AsyncClient, engine: FakeEngine, body: dict[str, object], param: str | None, code: str
) -> None:
    response = await http.post(URL, json=body)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert engine.requests == []


async def test_a_schema_that_cannot_be_used_is_named_as_the_caller_wrote_it(
    http: httpx2.AsyncClient, grammars: FakeGrammars
) -> None:
    grammars.bad = ("odd",)
    schema = {"type": "json_schema", "name": "n", "schema": {"const": "odd"}}
    error = (await http.post(URL, json=form(**schema))).json()["error"]
    assert error["param"] == "text.format.schema"
    assert error["message"].startswith("Invalid value for 'text.format.schema': ")


async def test_harmless_fields_are_named_to_the_caller(http: httpx2.AsyncClient) -> None:
    body = ask(store=True, user="u", background=False, truncation="disabled", previous_response_id=None)
    response = await http.post(URL, json=body)
    assert response.status_code == 200
    assert response.headers["x-toptwo-ignored"] == "store, user"


async def test_a_model_that_is_not_ready(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.info = None
    assert (await http.post(URL, json=ask())).status_code == 503


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
    *_, error, failed = await stream(http)
    assert error["type"] == "error"
    assert error["message"].startswith(sentence)
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["message"] == error["message"]
    assert failed["response"]["output"][0]["content"][0]["text"] == "bc"
    assert failed["response"]["output"][0]["status"] == "incomplete"
    assert (await http.post(URL, json=ask())).status_code == 500


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


async def test_the_context_of_the_engine_holds(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.info = engine_info(max_model_len=5)
    error = (await http.post(URL, json=ask())).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
