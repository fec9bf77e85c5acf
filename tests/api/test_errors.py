"""Bad requests: the right status, code and param, in the envelope, and never a 5xx."""

from __future__ import annotations

import asyncio
import json

import httpx2
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, chat, served_model
from toptwo.api import body as body_module
from toptwo.api.health import Lifecycle
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.api.security import KeyRing
from toptwo.app import create_app
from toptwo.text.template import ChatTemplate

URL = "/v1/chat/completions"
BEARER = [("authorization", f"Bearer {KEY}"), ("content-type", "application/json")]
USER = {"role": "user", "content": "hello"}


def message(**fields: object) -> dict[str, object]:
    """A request whose second message is this one."""
    return chat(messages=[USER, fields])


def part(**fields: object) -> dict[str, object]:
    """A request with this content part."""
    return chat(messages=[{"role": "user", "content": [fields]}])


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in chat().items() if name not in names}


async def post(app: FastAPI, body: bytes) -> tuple[int, dict[str, object]]:
    call = AsgiCall("POST", URL, BEARER, body)
    await asyncio.wait_for(call.run(app), 20)
    assert call.status is not None
    return call.status, json.loads(call.answer)


def assert_envelope(answer: dict[str, object]) -> dict[str, str | None]:
    assert list(answer) == ["error"]
    error = answer["error"]
    assert isinstance(error, dict)
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert len(json.dumps(answer)) < 2000
    assert "Traceback" not in error["message"]
    return error


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


DEEP: list[object] = []
for _ in range(70):
    DEEP = [DEEP]


def json_schema(**fields: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": fields}


CASES = [
    # body, param, code
    (without("model"), "model", "missing_required_parameter"),
    (without("messages"), "messages", "missing_required_parameter"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages="hi"), "messages", "invalid_type"),
    (chat(messages=[5]), "messages[0]", "invalid_type"),
    (chat(messages=[USER] * 10_001), "messages", "invalid_value"),
    (chat(model=5), "model", "invalid_type"),
    (chat(model=""), "model", "invalid_value"),
    (message(content="x"), "messages[1].role", "missing_required_parameter"),
    (message(role="user"), "messages[1].content", "missing_required_parameter"),
    (message(role="alien", content="x"), "messages[1].role", "invalid_value"),
    (message(role=5, content="x"), "messages[1].role", "invalid_type"),
    (message(role="tool", content="x"), "messages[1].tool_call_id", "invalid_value"),
    (message(role="user", content="x", tool_call_id="1"), "messages[1].tool_call_id", "invalid_value"),
    (message(role="user", content="x", tool_calls=[CALL]), "messages[1].tool_calls", "invalid_value"),
    (message(role="function", content="x", name="f"), "messages[1].role", "unsupported_parameter"),
    (message(role="assistant", content=None), "messages[1].content", "missing_required_parameter"),
    (message(role="assistant", tool_calls=[]), "messages[1].content", "missing_required_parameter"),
    (
        message(role="assistant", tool_calls=[{}]),
        "messages[1].tool_calls[0].id",
        "missing_required_parameter",
    ),
    (
        message(role="assistant", tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]),
        "messages[1].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    (message(role="user", content="x", weight=1), "messages[1].weight", "unknown_parameter"),
    (message(role="user", content="x", name="a b"), "messages[1].name", "invalid_value"),
    (message(role="user", content=5), "messages[1].content", "invalid_type"),
    (message(role="user", content=[]), "messages[1].content", "invalid_value"),
    (message(role="user", content=["x"]), "messages[1].content[0]", "invalid_type"),
    (part(type="image_url", image_url={}), "messages[0].content[0].type", "unsupported_parameter"),
    (part(type="input_audio", input_audio={}), "messages[0].content[0].type", "unsupported_parameter"),
    (part(type="file", file={}), "messages[0].content[0].type", "unsupported_parameter"),
    (part(type="text"), "messages[0].content[0].text", "missing_required_parameter"),
    (part(type="smell", text="x"), "messages[0].content[0].type", "invalid_value"),
    (part(type="text", text=None), "messages[0].content[0].text", "invalid_type"),
    (chat(temperature=2.1), "temperature", "invalid_value"),
    (chat(temperature=-0.1), "temperature", "invalid_value"),
    (chat(temperature="1"), "temperature", "invalid_type"),
    (chat(temperature=True), "temperature", "invalid_type"),
    (chat(top_p=-0.1), "top_p", "invalid_value"),
    (chat(top_p=1.1), "top_p", "invalid_value"),
    (chat(top_k=-2), "top_k", "invalid_value"),
    (chat(top_k=1.5), "top_k", "invalid_type"),
    (chat(min_p=-1), "min_p", "invalid_value"),
    (chat(presence_penalty=-2.5), "presence_penalty", "invalid_value"),
    (chat(frequency_penalty=3), "frequency_penalty", "invalid_value"),
    (chat(repetition_penalty=0), "repetition_penalty", "invalid_value"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(max_tokens="5"), "max_tokens", "invalid_type"),
    (chat(max_tokens=2**31), "max_tokens", "invalid_value"),
    (chat(max_completion_tokens=-1), "max_completion_tokens", "invalid_value"),
    (chat(max_tokens=1, max_completion_tokens=2), "max_tokens", "invalid_value"),
    (chat(max_tokens=5000), "messages", "context_length_exceeded"),
    (chat(stop=""), "stop", "invalid_value"),
    (chat(stop=["a", ""]), "stop[1]", "invalid_value"),
    (chat(stop=["x"] * 5), "stop", "invalid_value"),
    (chat(stop="x" * 257), "stop", "invalid_value"),
    (chat(stop=5), "stop", "invalid_type"),
    (chat(stop=[5]), "stop[0]", "invalid_type"),
    (chat(stop=["x"] * 100_000), "stop", "invalid_value"),
    (chat(seed=1.5), "seed", "invalid_type"),
    (chat(seed=2**63), "seed", "invalid_value"),
    (chat(seed=2**64), "seed", "invalid_type"),
    (chat(seed=True), "seed", "invalid_type"),
    (chat(n=65), "n", "invalid_value"),
    (chat(n=0), "n", "invalid_value"),
    (chat(n=2**31), "n", "invalid_value"),
    (chat(n=-1), "n", "invalid_value"),
    (chat(n=10**9), "n", "invalid_value"),
    (chat(n=1e9), "n", "invalid_type"),
    (chat(n=2**64), "n", "invalid_type"),
    (chat(n="1"), "n", "invalid_type"),
    (chat(n=1.5), "n", "invalid_type"),
    (chat(n=[1]), "n", "invalid_type"),
    (chat(n=64, max_tokens=2**31), "max_tokens", "invalid_value"),
    (chat(n=64, max_tokens=2**31 - 1), "messages", "context_length_exceeded"),
    (chat(n=True), "n", "invalid_type"),
    (chat(stream="true"), "stream", "invalid_type"),
    (chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (chat(stream=True, stream_options={"usage": True}), "stream_options.usage", "unknown_parameter"),
    (chat(stream=True, stream_options=[]), "stream_options", "invalid_type"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "missing_required_parameter"),
    (chat(tools=[{"type": "custom", "custom": {}}]), "tools[0].type", "unsupported_parameter"),
    (chat(tools=[TOOL, TOOL]), "tools", "invalid_value"),
    (
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        "tools[0].function.name",
        "invalid_value",
    ),
    (chat(tools=[TOOL] * 129), "tools", "invalid_value"),
    (chat(tool_choice="required"), "tool_choice", "invalid_value"),
    (chat(tools=[TOOL], tool_choice="any"), "tool_choice", "invalid_value"),
    (chat(tools=[TOOL], tool_choice={"type": "function"}), "tool_choice.function", "invalid_value"),
    (chat(tools=[TOOL], tool_choice={"type": "custom"}), "tool_choice.type", "unsupported_parameter"),
    (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice",
        "invalid_value",
    ),
    (chat(tools=[TOOL], response_format={"type": "json_object"}), "response_format", "unsupported_parameter"),
    (chat(functions=[{}]), "functions", "unsupported_parameter"),
    (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "invalid_value"),
    (
        chat(response_format=json_schema(name="n", schema=5)),
        "response_format.json_schema.schema",
        "invalid_type",
    ),
    (
        chat(response_format={"type": "json_object"}, guided_regex="a"),
        "guided_regex",
        "invalid_value",
    ),
    (chat(guided_regex="a", ignore_eos=True), "ignore_eos", "invalid_value"),
    (chat(guided_regex=""), "guided_regex", "invalid_value"),
    (chat(guided_grammar="x" * 70_000), "guided_grammar", "invalid_value"),
    (chat(top_logprobs=3), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(logprobs=1), "logprobs", "invalid_type"),
    (chat(logit_bias={"5": 101}), "logit_bias.5", "invalid_value"),
    (chat(logit_bias={"five": 1}), "logit_bias.five", "invalid_value"),
    (chat(logit_bias={"999999": 1}), "logit_bias", "invalid_value"),
    (chat(logit_bias=[1]), "logit_bias", "invalid_type"),
    (chat(min_tokens=-1), "min_tokens", "invalid_value"),
    (chat(stop_token_ids=[-1]), "stop_token_ids[0]", "invalid_value"),
    (chat(stop_token_ids=[1] * 129), "stop_token_ids", "invalid_value"),
    (chat(enable_thinking="yes"), "enable_thinking", "invalid_type"),
    (chat(metadata=DEEP), None, "invalid_value"),
    (chat(store=True), "store", "unsupported_parameter"),
    (chat(service_tier="flex"), "service_tier", "unsupported_parameter"),
    (chat(reasoning_effort="high"), "reasoning_effort", "unsupported_parameter"),
    (chat(modalities=["audio"]), "modalities", "unsupported_parameter"),
    (chat(audio={}), "audio", "unsupported_parameter"),
    (chat(web_search_options={}), "web_search_options", "unsupported_parameter"),
    (chat(moderation={}), "moderation", "unsupported_parameter"),
    (chat(temprature=1), "temprature", "unknown_parameter"),
    (chat(chat_template="{{ 1 }}"), "chat_template", "unknown_parameter"),
    (chat(**{"x" * 100_000: 1}), "x" * 64, "unknown_parameter"),
    (chat(**{f"x{i}": 1 for i in range(50_000)}), "x0", "unknown_parameter"),
]


@pytest.mark.parametrize(("body", "param", "code"), CASES, ids=[f"{str(c[1])[:40]}-{c[2]}" for c in CASES])
async def test_each_mistake_is_named(app: FastAPI, body: object, param: str | None, code: str) -> None:
    status, answer = await post(app, json.dumps(body).encode())
    error = assert_envelope(answer)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)


VALID = json.dumps(chat()).encode()
BAD_BYTES = [
    b"",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"{",
    b"{}x",
    b"\xef\xbb\xbf" + VALID,
    VALID.decode().encode("utf-16"),
    b"\xff",
    VALID.replace(b"hello", b"\xed\xa0\x80"),
    VALID.replace(b"hello", b"\\ud800"),
    VALID.replace(b'"hello"', b"NaN"),
    VALID[:-1] + b', "temperature": NaN}',
    VALID[:-1] + b', "temperature": Infinity}',
    VALID[:-1] + b', "temperature": 1e999}',
    VALID[:-1] + b', "metadata": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("body", BAD_BYTES, ids=range(len(BAD_BYTES)))
async def test_bytes_that_are_no_request(app: FastAPI, body: bytes) -> None:
    status, answer = await post(app, body)
    assert status == 400
    assert_envelope(answer)


@pytest.mark.parametrize("content", ["", " ", "\0", "\ufeff", "\U0010ffff", "\u202e", "x" * 1000])
async def test_odd_but_valid_texts_are_answered(app: FastAPI, content: str) -> None:
    body = chat(messages=[{"role": "user", "content": content}])
    assert (await post(app, json.dumps(body).encode()))[0] == 200


async def test_unknown_model(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_unknown_paths_and_methods(http: httpx2.AsyncClient) -> None:
    response = await http.get("/v1/nothing")
    assert response.status_code == 404
    assert_envelope(response.json())
    response = await http.get(URL)
    assert response.status_code == 405
    assert_envelope(response.json())


async def test_no_engine_is_a_503(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.info = None
    for stream in (True, False):
        response = await http.post(URL, json=chat(stream=stream))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert assert_envelope(response.json())["type"] == "server_error"
    response = await http.get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (503, "unready")
    assert (await http.get("/health/live")).status_code == 200


async def test_draining_takes_nothing_new(http: httpx2.AsyncClient, lifecycle: Lifecycle) -> None:
    lifecycle.draining = True
    response = await http.post(URL, json=chat())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"
    assert (await http.get("/health/ready")).json()["reason"] == "shutting down"


async def test_a_template_that_refuses(engine: FakeEngine) -> None:
    model = served_model()
    template = ChatTemplate("{{ raise_exception('Only one message, please.' + 'x' * 9999) }}", {})
    picky = type(model)(model.name, model.created, model.tokenizer, template)
    status, answer = await post(
        create_app(engine, picky, FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle()), VALID
    )
    error = assert_envelope(answer)
    assert (status, error["param"]) == (400, "messages")
    assert str(error["message"]).startswith("Only one message, please.")


async def test_a_fault_of_ours_leaks_nothing(app: FastAPI, engine: FakeEngine) -> None:
    engine.info = object()  # type: ignore[assignment]
    call = AsgiCall("POST", URL, BEARER, VALID)
    with capture_logs() as logs:
        await call.run(app)
    assert call.status == 500
    error = assert_envelope(json.loads(call.answer))
    assert error["message"] == "The server had an error while processing your request."
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["request_id"] == call.answer_headers["x-request-id"]
    assert entry["exc_info"]


class TestBodySize:
    """The cap counts what arrives, whatever was declared."""

    async def test_a_declared_length_is_refused_unread(self, app: FastAPI) -> None:
        for declared in ("8388609", "9" * 19, "1" + "0" * 18):
            call = AsgiCall("POST", URL, [*BEARER, ("content-length", declared)], b"{}")
            await call.run(app)
            assert call.status == 413
            assert_envelope(json.loads(call.answer))

    @pytest.mark.parametrize("declared", ["-1", "nonsense", "5", "9" * 400, "²"])
    async def test_a_lying_length_does_not_help(self, app: FastAPI, declared: str) -> None:
        call = AsgiCall("POST", URL, [*BEARER, ("content-length", declared)], b" " * (8 * 2**20 + 1))
        await call.run(app)
        assert call.status == 413

    async def test_chunks_are_counted(self, app: FastAPI) -> None:
        call = AsgiCall("POST", URL, BEARER, b"x" * 2**20)
        call.repeat_body = 100
        await call.run(app)
        assert call.status == 413
        assert call.num_received < 12

    async def test_a_large_body_within_the_cap_is_read(self, app: FastAPI) -> None:
        body = chat(messages=[{"role": "user", "content": "x" * 2**20}])
        status, answer = await post(app, json.dumps(body).encode())
        assert (status, assert_envelope(answer)["code"]) == (400, "context_length_exceeded")

    async def test_a_slow_sender_is_given_up(self, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(body_module, "MAX_READ_SECONDS", 0.05)
        call = AsgiCall("POST", URL, BEARER, b"{")
        call.more_body = True
        await asyncio.wait_for(call.run(app), 5)
        assert call.status == 408


# Requests that are nearly right: every field may hold something odd.
odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", "none", "auto", "<|im_end|>", "org/tiny-moe"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
text_parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}))
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]) | odd_values,
            "content": st.text(max_size=50) | text_parts | odd_values,
            "name": odd_values,
            "tool_calls": odd_values,
        },
    ),
    max_size=4,
)
table = ChatCompletionRequest.table
names = [*ChatCompletionRequest.model_fields, *table.harmless, *table.neutral]
bodies = st.fixed_dictionaries(
    {"model": st.just("org/tiny-moe") | odd_values, "messages": messages | odd_values},
    optional={name: odd_values for name in names if name not in ("model", "messages")},
)


@settings(max_examples=100, deadline=None)
@given(bodies | odd_values)
def test_no_body_makes_a_5xx(body: object) -> None:
    app = create_app(FakeEngine(), served_model(), FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())

    async def ask() -> None:
        call = AsgiCall("POST", URL, BEARER, json.dumps(body).encode())
        await asyncio.wait_for(call.run(app), 20)
        assert call.status is not None
        assert call.status < 500, call.answer
        if call.status != 200:
            assert_envelope(json.loads(call.answer))

    asyncio.run(ask())


damaged = st.tuples(st.integers(0, len(VALID)), st.binary(max_size=8)).map(
    lambda damage: VALID[: damage[0]] + damage[1] + VALID[damage[0] + 1 :]
)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | damaged)
def test_no_bytes_make_a_5xx(body: bytes) -> None:
    app = create_app(FakeEngine(), served_model(), FakeGrammars(), KeyRing.from_keys([KEY]), Lifecycle())
    call = AsgiCall("POST", URL, BEARER, body)
    asyncio.run(asyncio.wait_for(call.run(app), 20))
    assert call.status is not None
    assert call.status < 500


def test_every_number_has_both_bounds() -> None:
    def numbers(schema: object, path: str) -> None:
        if isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(schema), path
                assert {"maximum", "exclusiveMaximum"} & set(schema), path
            if schema.get("type") == "array":
                assert "maxItems" in schema, path
            for key, value in schema.items():
                numbers(value, f"{path}.{key}")
        elif isinstance(schema, list):
            for value in schema:
                numbers(value, path)

    numbers(ChatCompletionRequest.model_json_schema(), "")
