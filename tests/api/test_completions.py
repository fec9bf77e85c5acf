"""Text completions: prompts of every shape, their echo, and what is reported on their tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from openai.types import Completion

from fakes import KEY, AsgiCall, FakeEngine, FakeGrammars, Script, byte_fallback_vocabulary, payloads
from toptwo.api.completion import ChoiceText, CompletionHead
from toptwo.api.generation import Usage
from toptwo.api.text_completion import form_of, text_completion
from toptwo.api.text_completion_schema import CompletionRequest
from toptwo.api.token_text import report_tokens
from toptwo.messages import GenerateRequest, TokenLogprobs
from toptwo.text.model import ServedModel
from toptwo.text.tokenizer import Tokenizer

URL = "/v1/completions"
BEARER = [("authorization", f"Bearer {KEY}")]


def ask(**fields: object) -> dict[str, object]:
    """A valid request, with the fields added."""
    return {"model": "org/tiny-moe", "prompt": "hello", **fields}


async def choices(http: httpx2.AsyncClient, **fields: object) -> list[dict[str, Any]]:
    response = await http.post(URL, json=ask(**fields))
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


@pytest.fixture
def answers(engine: FakeEngine, model: ServedModel) -> FakeEngine:
    """Answers the prompt itself in brackets, then !, !! and so on by the number of the choice."""

    def script_of(request: GenerateRequest) -> Script:
        _, _, number = request.request_id.rpartition("-")
        text = f"<{model.tokenizer.decode(request.prompt_ids)}>" + "!" * (
            int(number) if number.isdecimal() else 0
        )
        return Script(token_ids=model.tokenizer.encode([text + "<|im_end|>"]), pause=0.001)

    engine.script_of = script_of
    return engine


async def test_the_official_client_gets_a_completion(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await sdk.completions.create(model="org/tiny-moe", prompt="hello")
    Completion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].text == "hello wo"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("cmpl-")
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)
    (request,) = engine.requests
    assert request.max_tokens == 16
    assert (request.logprobs.output, request.logprobs.prompt) == (None, None)


async def test_a_prompt_is_taken_as_it_is(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    text = "<|im_start|>user\nhello"
    ids = model.tokenizer.encode([text])
    assert ids[0] in model.tokenizer.special_ids
    for prompt in (text, [text], ids, [ids]):
        await choices(http, prompt=prompt, temperature=0, seed=3, stop=["zz"], max_tokens=9)
    assert [request.prompt_ids for request in engine.requests] == [ids] * 4
    assert {request.sampling.seed for request in engine.requests} == {3}
    assert {request.max_tokens for request in engine.requests} == {9}


@pytest.mark.parametrize("prompt", [["hello", "im", "wo"], [[65], [66, 67], [68]]])
async def test_choices_lie_prompt_by_prompt(
    http: httpx2.AsyncClient, answers: FakeEngine, model: ServedModel, prompt: list[str] | list[list[int]]
) -> None:
    texts = [one if isinstance(one, str) else model.tokenizer.decode(one) for one in prompt]
    expected = [f"<{text}>{mark}" for text in texts for mark in ("", "!")]
    response = await http.post(URL, json=ask(prompt=prompt, n=2, max_tokens=99))
    Completion.model_validate(response.json(), strict=True)
    whole = response.json()["choices"]
    assert [choice["index"] for choice in whole] == list(range(6))
    assert [choice["text"] for choice in whole] == expected
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == sum(len(request.prompt_ids) for request in answers.requests[::2])
    assert usage["completion_tokens"] == answers.num_tokens
    body = ask(prompt=prompt, n=2, max_tokens=99, stream=True, stream_options={"include_usage": True})
    *chunks, last = payloads((await http.post(URL, json=body)).text)
    for chunk in chunks:
        assert chunk["usage"] is None
    assert last["choices"] == []
    assert last["usage"] == usage
    parts: list[dict[str, Any]] = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    for index, text in enumerate(expected):
        own = [part for part in parts if part["index"] == index]
        assert "".join(part["text"] for part in own) == text
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == ["stop"]
    assert len({request.request_id for request in answers.requests}) == 12


async def test_the_official_client_reads_the_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(model="org/tiny-moe", prompt="hello", stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello wo"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_comes_first(http: httpx2.AsyncClient, stream: bool) -> None:
    if stream:
        body = ask(prompt=["im ", "wo "], echo=True, stream=True)
        parts = [chunk["choices"][0] for chunk in payloads((await http.post(URL, json=body)).text)]  # type: ignore[index]
        texts = ["".join(part["text"] for part in parts if part["index"] == index) for index in (0, 1)]
    else:
        texts = [choice["text"] for choice in await choices(http, prompt=["im ", "wo "], echo=True)]
    assert texts == ["im hello wo", "wo hello wo"]


async def test_reports_on_generated_tokens(http: httpx2.AsyncClient, model: ServedModel) -> None:
    ids = model.tokenizer.encode(["hello wo"])
    (choice,) = await choices(http, logprobs=2)
    assert choice["logprobs"] == {
        "tokens": ["hello", " wo"],
        "token_logprobs": [-i / 100 for i in ids],
        "top_logprobs": [
            {"!": 0.0, '"': -0.01, "hello": -ids[0] / 100},
            {"!": 0.0, '"': -0.01, " wo": -ids[1] / 100},
        ],
        "text_offset": [0, 5],
    }
    (choice,) = await choices(http, logprobs=0)
    assert choice["logprobs"]["top_logprobs"] == [{"hello": -ids[0] / 100}, {" wo": -ids[1] / 100}]


async def test_parts_of_characters_are_shown_as_bytes(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    engine.script = Script(token_ids=model.tokenizer.encode(["é!"]), finish="length")
    (choice,) = await choices(http, logprobs=0)
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_how_likely_a_text_is(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel, as_ids: bool, stream: bool
) -> None:
    """What evaluations ask for: all tokens of the prompt, and exactly one more even if it ends the answer."""
    texts = ["hello wo", "im é hello"]
    prompts = [model.tokenizer.encode([text]) for text in texts]
    engine.script = Script(token_ids=[*model.stop_token_ids], finish="length")
    asked: dict[str, Any] = {"prompt": prompts if as_ids else texts, "echo": True, "logprobs": 1}
    asked |= {"max_tokens": 1, "temperature": 0}
    if stream:
        body = ask(**asked, stream=True)
        found = [chunk["choices"][0] for chunk in payloads((await http.post(URL, json=body)).text)]  # type: ignore[index]
    else:
        found = await choices(http, **asked)
    for index, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        (choice,) = [one for one in found if one["index"] == index]
        assert choice["text"] == text
        report = choice["logprobs"]
        assert report["token_logprobs"] == [None, *(-i / 100 for i in [*ids, *model.stop_token_ids][1:])]
        assert report["top_logprobs"][0] is None
        assert all("!" in top for top in report["top_logprobs"][1:])
        assert len(report["tokens"]) == len(report["text_offset"]) == len(ids) + 1
        assert report["text_offset"][-1] == len(text)
        assert report["tokens"][0] == text[: report["text_offset"][1]]
    assert all(request.stop_token_ids == [] for request in engine.requests)


async def test_no_output_is_wanted(http: httpx2.AsyncClient, engine: FakeEngine) -> None:
    response = await http.post(URL, json=ask(prompt="im é", echo=True, logprobs=0, max_tokens=0, n=2))
    for choice in response.json()["choices"]:
        assert choice["text"] == "im é"
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == ["im", " ", "bytes:\\xc3", "bytes:\\xa9"]
        assert choice["logprobs"]["text_offset"] == [0, 2, 3, 3]
    assert response.json()["usage"]["completion_tokens"] == 0
    assert {request.max_tokens for request in engine.requests} == {1}
    body = ask(prompt="im é", echo=True, max_tokens=0, stream=True)
    parts = [chunk["choices"][0] for chunk in payloads((await http.post(URL, json=body)).text)]  # type: ignore[index]
    assert "".join(part["text"] for part in parts) == "im é"
    assert parts[-1]["finish_reason"] == "length"


async def test_the_likeliest_of_many(
    http: httpx2.AsyncClient, engine: FakeEngine, model: ServedModel
) -> None:
    """Low ids are likely here; a long answer is not less likely for its length."""

    def script_of(request: GenerateRequest) -> Script:
        number = request.request_id.rpartition("-")[2]
        ids = {"1": [0], "2": [1, 1, 1, 1], "3": [200]}.get(number, [100])
        return Script(token_ids=[*ids, *model.stop_token_ids])

    engine.script_of = script_of
    response = await http.post(URL, json=ask(n=2, best_of=4))
    found = response.json()["choices"]
    assert [choice["index"] for choice in found] == [0, 1]
    assert [choice["text"] for choice in found] == [
        model.tokenizer.decode([0]),
        model.tokenizer.decode([1] * 4),
    ]
    assert all(choice["logprobs"] is None for choice in found)
    assert response.json()["usage"]["completion_tokens"] == engine.num_tokens
    assert len(engine.requests) == 4
    await choices(http, n=2, best_of=2)
    assert [request.logprobs.output for request in engine.requests] == [0] * 4 + [None] * 2


def test_offsets_with_a_vocabulary_that_adds_spaces() -> None:
    tokenizer = Tokenizer(byte_fallback_vocabulary())
    begin = tokenizer.id_of("<s>")
    assert begin is not None
    for prompt, offsets in (("hell he", [0, 0, 4]), (" hell he", [0, 0, 1, 5])):
        ids = [begin, *tokenizer.encode([prompt])]
        request = CompletionRequest(model="m", prompt=prompt, echo=True, logprobs=0)
        form = form_of(request, [ids], tokenizer)
        reports = report_tokens(tokenizer, ids[1:], [TokenLogprobs(-1.0, [], [])] * (len(ids) - 1))
        choice = ChoiceText(["!"], prompt_reports=[*reports], finish_reason="length", usage=Usage(1, 1, 0))
        body = text_completion(CompletionHead("c", 1, "m", "f"), [choice], form, 1)
        report = json.loads(body)["choices"][0]["logprobs"]
        assert report["text_offset"] == offsets, report["tokens"]


@pytest.mark.parametrize(
    "form",
    [
        {"guided_regex": "a+"},
        {"guided_grammar": 'start: "a"'},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
    ],
)
async def test_forms_are_grammars(
    http: httpx2.AsyncClient, engine: FakeEngine, grammars: FakeGrammars, form: dict[str, object]
) -> None:
    await choices(http, **form)
    (request,) = engine.requests
    assert request.grammar
    assert grammars.checked == [request.grammar.source]
    grammars.bad = ("grammars",)
    error = (await http.post(URL, json=ask(**form))).json()["error"]
    assert error["param"].startswith(next(iter(form)))
    await choices(http, response_format={"type": "text"})


DEEP: object = []
for _ in range(70):
    DEEP = [DEEP]

CASES: list[tuple[dict[str, object], str | None, str]] = [
    ({"model": "org/tiny-moe"}, "prompt", "missing_required_parameter"),
    (ask(prompt=None), "prompt", "invalid_type"),
    (ask(prompt=5), "prompt", "invalid_type"),
    (ask(prompt={}), "prompt", "invalid_type"),
    (ask(prompt=""), "prompt", "invalid_value"),
    (ask(prompt=[]), "prompt", "invalid_value"),
    (ask(prompt=[[]]), "prompt[0]", "invalid_value"),
    (ask(prompt=["a", 5]), "prompt[1]", "invalid_type"),
    (ask(prompt=[5, "a"]), "prompt[1]", "invalid_type"),
    (ask(prompt=[True]), "prompt[0]", "invalid_type"),
    (ask(prompt=[1.5]), "prompt[0]", "invalid_type"),
    (ask(prompt=[-1]), "prompt[0]", "invalid_value"),
    (ask(prompt=[2**31]), "prompt[0]", "invalid_value"),
    (ask(prompt=[266]), "prompt", "invalid_value"),
    (ask(prompt=[[1], [266]]), "prompt", "invalid_value"),
    (ask(prompt=[[1], "a"]), "prompt[1]", "invalid_type"),
    (ask(prompt=[[1], [None]]), "prompt[1][0]", "invalid_type"),
    (ask(prompt=["a"] * 65), "prompt", "invalid_value"),
    (ask(prompt=["a"] * 33, n=2), "prompt", "invalid_value"),
    (ask(prompt=["a"] * 33, best_of=2), "prompt", "invalid_value"),
    (ask(prompt=DEEP), None, "invalid_value"),
    (ask(max_tokens=0), "max_tokens", "invalid_value"),
    (ask(max_tokens=-1), "max_tokens", "invalid_value"),
    (ask(max_tokens="5"), "max_tokens", "invalid_type"),
    (ask(max_tokens=2048), "prompt", "context_length_exceeded"),
    (ask(prompt=[1] * 2048), "prompt", "context_length_exceeded"),
    (ask(best_of=0), "best_of", "invalid_value"),
    (ask(best_of=-1), "best_of", "invalid_value"),
    (ask(best_of=2**31), "best_of", "invalid_value"),
    (ask(best_of=True), "best_of", "invalid_type"),
    (ask(best_of="1"), "best_of", "invalid_type"),
    (ask(n=2**31), "n", "invalid_value"),
    (ask(best_of=65), "best_of", "invalid_value"),
    (ask(best_of=1, n=2), "best_of", "invalid_value"),
    (ask(best_of=2, stream=True), "best_of", "invalid_value"),
    (ask(logprobs=21), "logprobs", "invalid_value"),
    (ask(logprobs=True), "logprobs", "invalid_type"),
    (ask(echo=1), "echo", "invalid_type"),
    (ask(suffix="end"), "suffix", "unsupported_parameter"),
    (ask(messages=[]), "messages", "unknown_parameter"),
    (ask(logit_bias={"999": 1}), "logit_bias", "invalid_value"),
    (ask(guided_regex="a", guided_grammar="b"), "guided_grammar", "invalid_value"),
    (ask(guided_regex="a", ignore_eos=True), "ignore_eos", "invalid_value"),
    (ask(stream_options={}), "stream_options", "invalid_value"),
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


async def test_harmless_fields_are_named_and_neutral_ones_are_not(http: httpx2.AsyncClient) -> None:
    response = await http.post(URL, json=ask(user="u", suffix=None, n=1, best_of=1))
    assert response.status_code == 200
    assert response.headers["x-toptwo-ignored"] == "user"


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_ends_every_prompt(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    engine.script = Script(token_ids=[65] * 9, hang_after=2)
    call = AsgiCall.post_json(URL, ask(prompt=["a", "b"], n=2, stream=stream), BEARER)
    running = asyncio.create_task(call.run(app))
    async with asyncio.timeout(5):
        while engine.num_open < 4 or engine.num_tokens < 8:
            await asyncio.sleep(0.001)
    call.leave()
    await asyncio.wait_for(running, 5)
    assert engine.num_open == 0
    assert len(engine.aborted) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt_that_fails_ends_them_all(
    http: httpx2.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    def script_of(request: GenerateRequest) -> Script:
        if request.request_id.endswith("-p2"):
            return Script(token_ids=[65], finish="error", error="Lost.", pause=0.005)
        return Script(token_ids=[65] * 5, hang_after=3)

    engine.script_of = script_of
    response = await http.post(URL, json=ask(prompt=["a", "b", "c"], stream=stream))
    if stream:
        assert payloads(response.text)[-1]["error"]["message"] == "Lost."  # type: ignore[index]
    else:
        assert (response.status_code, response.json()["error"]["message"]) == (500, "Lost.")
    assert engine.num_open == 0


async def test_embeddings_are_refused_in_plain_words(
    http: httpx2.AsyncClient, stranger: httpx2.AsyncClient, sdk: openai.AsyncOpenAI
) -> None:
    for body in (b"{}", b"", b"no json"):
        response = await http.post("/v1/embeddings", content=body)
        assert response.status_code == 501
        assert response.json()["error"]["code"] == "unsupported_endpoint"
    assert (await stranger.post("/v1/embeddings")).status_code == 401
    with pytest.raises(openai.APIStatusError, match="does not compute embeddings"):
        await sdk.embeddings.create(model="org/tiny-moe", input="hello")
