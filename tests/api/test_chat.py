"""Whole answers: what the engine is asked for, and what the caller gets."""

from __future__ import annotations

import httpx2
import openai
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion

from fakes import FakeEngine, Script, chat, engine_info
from toptwo.api.completion import collect
from toptwo.api.generation import generate
from toptwo.api.job import GenerationJob, OutputForm
from toptwo.api.schemas import ChatCompletionRequest
from toptwo.errors import internal_error
from toptwo.messages import GenerateRequest, SamplingParams
from toptwo.text.model import ServedModel

URL = "/v1/chat/completions"


async def test_the_official_client_gets_an_answer(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await sdk.chat.completions.create(
        model="org/tiny-moe", messages=[{"role": "user", "content": "hello"}]
    )
    assert answer.choices[0].message.content == "hello wo"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "org/tiny-moe"
    assert answer._request_id
    assert answer.usage
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_ids)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    assert (engine.num_open, engine.aborted) == (0, [])


@pytest.mark.parametrize("prefix", ["/v3/openai", "/openai/v1", "/v1"])
async def test_the_body_is_openais_type_under_every_prefix(http: httpx2.AsyncClient, prefix: str) -> None:
    response = await http.post(f"{prefix}/chat/completions", json=chat())
    assert response.status_code == 200
    ChatCompletion.model_validate(response.json(), strict=True)
    assert response.json()["system_fingerprint"].startswith("fp_")
    assert int(response.headers["openai-processing-ms"]) >= 0


async def test_the_engine_is_asked_for_what_the_caller_said(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        max_tokens=7,
        seed=-5,
    )
    assert (await http.post(URL, json=body)).status_code == 200
    (request,) = engine.requests
    assert request.sampling == SamplingParams(
        seed=-5,
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
    )
    assert request.max_tokens == 7
    assert request.stop_token_ids == list(model.stop_token_ids)
    assert len(request.cache_scope) == 16
    assert model.tokenizer.decode(request.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_defaults_are_openais(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    optional = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    nulls = dict.fromkeys([*optional, "tools", "logprobs", "user"])
    for body in (chat(), chat(**nulls)):
        assert (await http.post(URL, json=body)).status_code == 200
    for request in engine.requests:
        assert request.sampling == SamplingParams(seed=request.sampling.seed)
        assert request.max_tokens == 2048 - len(request.prompt_ids)
    first, second = (request.sampling.seed for request in engine.requests)
    assert first != second
    assert -(2**63) <= first < 2**63


async def test_a_fixed_request_id_is_never_the_engines(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    for _ in range(2):
        response = await http.post(URL, json=chat(), headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
    response = await http.post(URL, json=chat(), headers={"x-request-id": "not sane" * 50})
    assert response.headers["x-request-id"].startswith("req_")
    assert len({request.request_id for request in engine.requests}) == 3


@pytest.mark.parametrize(
    ("stop", "shown"),
    [("l", "he"), (["wo"], "hello "), (["lo w", "zz"], "hel"), ("hello wo", ""), ("absent", "hello wo")],
)
async def test_stop_strings(http: httpx2.AsyncClient, engine: FakeEngine, stop: object, shown: str) -> None:
    engine.script.pause = 0.001
    body = (await http.post(URL, json=chat(stop=stop))).json()
    assert body["choices"][0]["message"]["content"] == shown
    assert body["choices"][0]["finish_reason"] == "stop"
    assert engine.num_open == 0


async def test_a_stop_string_aborts_the_engine(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    engine.script.hang_after = 1
    body = (await http.post(URL, json=chat(stop="llo"))).json()
    assert body["choices"][0]["message"]["content"] == "he"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert engine.aborted == [engine.requests[0].request_id]


async def test_length_and_cached_tokens(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    ids = model.tokenizer.encode(["hello 👍"])[:-1]
    engine.script = Script(token_ids=ids, finish="length", num_cached_tokens=5)
    body = (await http.post(URL, json=chat(max_completion_tokens=len(ids)))).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "hello \ufffd"
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert body["usage"]["completion_tokens"] == len(ids)


async def test_an_ordinary_token_that_ends_the_answer_is_not_shown(
    engine: FakeEngine, model: ServedModel
) -> None:
    ids = model.tokenizer.encode(["hello!"])
    engine.script = Script(token_ids=ids)
    request = GenerateRequest("r", [1], SamplingParams(0), max_tokens=9, stop_token_ids=ids[-1:])
    job = GenerationJob((request,), OutputForm())
    deltas = [delta async for delta in generate(engine, model, job, internal_error)]
    assert collect(deltas, 1)[0].text == "hello"


async def test_ignore_eos_leaves_the_engine_no_token_to_stop_at(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    engine.script = Script(token_ids=model.tokenizer.encode(["hello<|im_end|> wo"]), finish="length")
    body = (await http.post(URL, json=chat(ignore_eos=True))).json()
    assert body["choices"][0]["message"]["content"] == "hello wo"
    assert body["choices"][0]["finish_reason"] == "length"
    for value in (False, None):
        await http.post(URL, json=chat(ignore_eos=value))
    stops = list(model.stop_token_ids)
    assert [request.stop_token_ids for request in engine.requests] == [[], stops, stops]
    error = (await http.post(URL, json=chat(ignore_eos=1))).json()["error"]
    assert error["param"] == "ignore_eos"


async def test_stop_strings_hold_with_ignore_eos(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    body = (await http.post(URL, json=chat(ignore_eos=True, stop="lo"))).json()
    assert body["choices"][0]["message"]["content"] == "hel"
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_harmless_fields_are_named_to_the_caller(http: httpx2.AsyncClient) -> None:
    body = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier=None,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        logprobs=False,
        n=1,
    )
    response = await http.post(URL, json=body)
    assert response.status_code == 200
    assert response.headers["x-toptwo-ignored"] == "user, metadata, store, service_tier, prompt_cache_key"
    assert "x-toptwo-ignored" not in (await http.post(URL, json=chat())).headers


async def test_our_own_answer_can_be_sent_back(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
    for _ in range(2):
        answer = await sdk.chat.completions.create(model="org/tiny-moe", messages=messages)  # type: ignore[arg-type]
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    assert len(engine.requests) == 2


async def test_models(sdk: openai.AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    (card,) = (await sdk.models.list()).data
    assert card == await sdk.models.retrieve("org/tiny-moe")
    assert (card.id, card.created, card.owned_by) == ("org/tiny-moe", 1_700_000_000, "toptwo")
    Model.model_validate((await http.get("/v1/models/org%2Ftiny-moe")).json(), strict=True)
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("../../etc/passwd")
    assert caught.value.code == "model_not_found"


async def test_the_context_is_filled_to_the_last_token(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    num_prompt = len(model.encode_chat([{"role": "user", "content": "hello"}]))
    engine.info = engine_info(max_model_len=num_prompt + 3)
    assert (await http.post(URL, json=chat())).status_code == 200
    assert (await http.post(URL, json=chat(max_tokens=3))).status_code == 200
    assert [request.max_tokens for request in engine.requests] == [3, 3]
    error = (await http.post(URL, json=chat(max_tokens=4))).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert error["message"].startswith(
        f"This model's maximum context length is {num_prompt + 3} tokens. However, you requested"
        f" {num_prompt + 4} tokens ({num_prompt} in the messages, 4 in the completion)."
    )
    engine.info = engine_info(max_model_len=num_prompt - 1)
    error = (await http.post(URL, json=chat())).json()["error"]
    assert error["message"].startswith(
        f"This model's maximum context length is {num_prompt - 1} tokens. However, your messages resulted"
        f" in {num_prompt} tokens."
    )


async def test_a_text_that_is_far_too_long_is_not_counted(
    http: httpx2.AsyncClient, engine: FakeEngine
) -> None:
    engine.info = engine_info(max_model_len=1000)
    text = "hello world " * 100_000
    messages = [{"role": "user", "content": text}]
    for path, body in (
        (URL, chat(messages=messages)),
        ("/v1/completions", {"model": "org/tiny-moe", "prompt": text}),
        ("/v1/messages", {"model": "org/tiny-moe", "messages": messages, "max_tokens": 1}),
    ):
        answer = await http.post(path, json=body)
        message = (
            "This model's maximum context length is 1000 tokens. However, your messages resulted in at least"
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f"{message} 1001 tokens.")
    counted = await http.post("/v1/tokenize", json={"prompt": text})
    assert counted.json()["count"] > 100_000
