"""The document of the API: it names what is served, bounds what is sent, and is true of what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from fakes import FakeEngine, Script, chat
from toptwo.api.api_operations import OPERATIONS, WITHOUT_PREFIX, Operation
from toptwo.api.openapi import openapi_document
from toptwo.app import OPENAI_PREFIXES
from toptwo.text.model import ServedModel

BY_NAME = {operation.name: operation for operation in (*OPERATIONS, *WITHOUT_PREFIX)}
MODEL = "org/tiny-moe"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi_document(OPENAI_PREFIXES, MODEL)


def path_item(document: dict[str, Any], path: str) -> dict[str, Any]:
    item = document["paths"][path]
    return document["components"]["pathItems"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # of GET and HEAD
def test_it_describes_every_route_and_no_other(app: FastAPI, document: dict[str, Any]) -> None:
    served = {(p, m) for p, methods in app.openapi()["paths"].items() for m in methods}
    methods = {"get", "head", "post", "put", "patch", "delete"}
    described = {(p, m) for p in document["paths"] for m in methods & set(path_item(document, p))}
    assert described == served


async def test_it_is_served_to_callers_with_a_key(
    http: httpx2.AsyncClient, stranger: httpx2.AsyncClient, document: dict[str, Any]
) -> None:
    assert (await stranger.get("/openapi.json")).status_code == 401
    response = await http.get("/openapi.json")
    assert response.status_code == 200
    assert response.json() == document


def nodes(value: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects of the document and where they are."""
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            yield from nodes(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner, path)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = [node["$ref"] for _, node in nodes(document) if "$ref" in node]
    assert len(references) > 100
    for reference in references:
        here: Any = document
        for step in reference.removeprefix("#/").split("/"):
            here = here[step]


def test_nothing_is_described_that_nothing_refers_to(document: dict[str, Any]) -> None:
    used = {node["$ref"] for _, node in nodes(document) if "$ref" in node}
    for kind in ("schemas", "parameters", "responses", "headers", "pathItems"):
        assert {f"#/components/{kind}/{name}" for name in document["components"][kind]} <= used


# Texts that the size of the body bounds.
UNBOUNDED = {
    "AnthropicMessage/content",
    "CalledFunction/arguments",
    "ChatMessage/content",
    "ChatMessage/reasoning_content",
    "CompletionRequest/prompt",
    "FunctionCallItem/arguments",
    "FunctionCallOutputItem/output",
    "MessageItem/content",
    "CountTokensRequest/system",
    "MessagesRequest/system",
    "ResponsePart/text",
    "ResponsesRequest/input",
    "ResponsesRequest/instructions",
    "TextBlock/text",
    "TextPart/text",
    "ThinkingBlock/thinking",
    "TokenizeRequest/prompt",
    "ToolResultBlock/content",
}


def reachable(document: dict[str, Any], kinds: list[type[BaseModel]]) -> dict[str, Any]:
    """The schemas that these refer to, themselves included."""
    schemas, found = document["components"]["schemas"], {}
    waiting = [kind.__name__ for kind in kinds]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = schemas[name]
            waiting += [n["$ref"].rpartition("/")[2] for _, n in nodes(schemas[name]) if "$ref" in n]
    return found


def test_everything_is_bounded(document: dict[str, Any]) -> None:
    checked = 0
    for path, node in nodes(document["components"]["schemas"]):
        kind = node.get("type")
        if kind in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(node), path
            assert {"maximum", "exclusiveMaximum"} & set(node), path
        elif kind == "array":
            assert "maxItems" in node, path
            assert "items" in node, path
        elif kind == "object":
            assert {"properties", "additionalProperties"} & set(node), path
        else:
            continue
        checked += 1
    assert checked > 100


def test_texts_of_requests_are_bounded(document: dict[str, Any]) -> None:
    requests = reachable(document, [operation.body for operation in OPERATIONS if operation.body])
    assert len(requests) > 30
    unbounded = set()
    for path, node in nodes(requests):
        bounds = {"maxLength", "pattern", "enum", "const"}
        if node.get("type") == "string" and not bounds & set(node) and "/propertyNames" not in path:
            _, schema, _, name, *_ = path.split("/")
            unbounded.add(f"{schema}/{name}")
    assert unbounded == UNBOUNDED


def test_requests_are_closed_and_name_what_makes_no_difference(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["additionalProperties"] is False
    assert {"messages", "user", "metadata", "functions"} <= set(schema["properties"])
    assert schema["required"] == ["model", "messages"]
    assert schema["properties"]["model"] == {"enum": [MODEL]}
    assert document["components"]["schemas"]["JsonSchemaFormat"]["properties"]["schema"]


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
MESSAGE = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
PROMPT = {"model": MODEL, "prompt": "hello"}
INPUT = {"model": MODEL, "input": "hello"}
CALLS = [
    ("chat_completions", chat()),
    ("chat_completions", chat(logprobs=True, top_logprobs=2, n=2)),
    ("chat_completions", chat(tools=[TOOL], tool_choice="required")),
    ("completions", {**PROMPT, "echo": True, "logprobs": 2, "n": 2}),
    ("completions", PROMPT),
    ("responses", INPUT),
    ("messages", MESSAGE),
]
OTHER_CALLS = [
    ("count_tokens", {"model": MODEL, "messages": MESSAGE["messages"]}),
    ("tokenize", {**PROMPT, "return_token_strs": True}),
    ("detokenize", {"model": MODEL, "tokens": [65, 66]}),
    ("models", None),
    ("model", None),
    ("embeddings", {}),
    ("live", None),
    ("ready", None),
]


async def ask(http: httpx2.AsyncClient, operation: Operation, body: object) -> httpx2.Response:
    prefix = OPENAI_PREFIXES[0] if operation in OPERATIONS else ""
    path = prefix + operation.path.replace("{model_id}", MODEL)
    return await http.request(operation.methods[0], path, json=body)


@pytest.fixture
def calling(engine: FakeEngine, model: ServedModel) -> FakeEngine:
    """Answers with a text, or with a call where tools are described."""
    call = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call><|im_end|>'
    answers = {
        True: Script(token_ids=model.tokenizer.encode([call])),
        False: Script(token_ids=model.tokenizer.encode(["hello wo<|im_end|>"]), num_cached_tokens=1),
    }
    engine.script_of = lambda request: answers[request.grammar is not None]
    return engine


@pytest.mark.parametrize(("name", "body"), [*CALLS, *OTHER_CALLS])
async def test_answers_are_as_described(
    http: httpx2.AsyncClient, calling: FakeEngine, name: str, body: object
) -> None:
    operation = BY_NAME[name]
    response = await ask(http, operation, body)
    if operation.answers:
        operation.answers[response.status_code].model_validate_json(response.text)
    else:
        assert response.status_code in operation.errors
        operation.error.model_validate_json(response.text)


@pytest.mark.parametrize(("name", "body"), CALLS)
@pytest.mark.parametrize("script", [None, Script(token_ids=[65, 66], finish="error")])
async def test_events_are_as_described(
    http: httpx2.AsyncClient, calling: FakeEngine, name: str, body: dict[str, object], script: Script | None
) -> None:
    if script:
        calling.script_of = lambda request: script
    operation = BY_NAME[name]
    assert operation.event
    options = {"stream_options": {"include_usage": True}} if "completions" in name else {}
    response = await ask(http, operation, {**body, "stream": True, **options})
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    assert len(lines) > 1
    for line in lines:
        data = line.removeprefix("data: ")
        kind = operation.error if "error" in json.loads(data) else operation.event
        kind.model_validate_json(data)


@pytest.mark.parametrize("name", [name for name, operation in BY_NAME.items() if operation.body])
async def test_refusals_are_as_described(
    http: httpx2.AsyncClient, stranger: httpx2.AsyncClient, engine: FakeEngine, name: str
) -> None:
    operation = BY_NAME[name]
    statuses = []
    for response in (await ask(http, operation, {}), await ask(stranger, operation, {})):
        operation.error.model_validate_json(response.text)
        statuses.append(response.status_code)
    # Not every one has a required field, but all know the model.
    response = await ask(http, operation, {"model": "other", "prompt": "a", "tokens": [1]})
    operation.error.model_validate_json(response.text)
    assert set(statuses) == {400, 401}
    assert {*statuses, response.status_code} <= set(operation.errors)
