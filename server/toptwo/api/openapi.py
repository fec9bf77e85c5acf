"""The description of the API, as an OpenAPI document that is built from the schemas themselves.

Knows what each route takes and answers; must not know how. Routes read their bodies themselves, so the
framework cannot see what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import orjson
from fastapi import APIRouter, Depends
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema
from starlette.responses import Response

from toptwo import __version__
from toptwo.api.anthropic import KEY_HEADER
from toptwo.api.api_operations import ERRORS, OPERATIONS, WITHOUT_PREFIX, Operation
from toptwo.api.security import Authenticator
from toptwo.api.service import IGNORED_HEADER
from toptwo.api.strict import StrictModel

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_NAMED_EVENTS = "One event of a stream; its name is its data's type."
_DATA_EVENTS = "One event of a stream. Behind the last one comes the data [DONE], which is no JSON."
_HEADERS = {
    "x-request-id": "Names the request; the caller's own, when it sends a sane one.",
    "openai-processing-ms": "Milliseconds until the answer began.",
    IGNORED_HEADER: "Fields of the request that made no difference.",
    "retry-after": "Seconds after which trying again makes sense.",
    "x-should-retry": "Whether trying again makes sense at all.",
    "www-authenticate": "How to send a key.",
}


def openapi_document(prefixes: Sequence[str], model_name: str) -> Json:
    """The OpenAPI 3.1 document of a server whose routes are mounted under all of the prefixes.

    What is the same under every prefix is described once. model_name: of the model that is served.
    """
    paths: Json = {
        prefix + operation.path: {"$ref": f"#/components/pathItems/{operation.name}"}
        for prefix in prefixes
        for operation in OPERATIONS
    }
    paths |= {operation.path: _path_item(operation) for operation in WITHOUT_PREFIX}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "toptwo",
            "version": __version__,
            "description": "An inference server for Mixture-of-Experts language models.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "pathItems": {operation.name: _path_item(operation) for operation in OPERATIONS},
            "schemas": _schemas(model_name),
            "parameters": {"model_id": _model_parameter(model_name)},
            "responses": _error_responses(),
            "headers": {
                name: {"description": sentence, "schema": {"type": "string"}}
                for name, sentence in _HEADERS.items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "anthropic": {"type": "apiKey", "in": "header", "name": KEY_HEADER},
            },
        },
    }


def openapi_router(prefixes: Sequence[str], model_name: str, authenticate: Authenticator) -> APIRouter:
    """GET /openapi.json, for callers with a key: it names every route."""
    router = APIRouter(dependencies=[Depends(authenticate)], tags=["openapi"])

    @cache
    def document() -> bytes:
        return orjson.dumps(openapi_document(prefixes, model_name))

    @router.get("/openapi.json")
    async def describe() -> Response:
        return Response(document(), media_type="application/json")

    return router


class _Generator(GenerateJsonSchema):
    """JSON schemas as short as they can be, with the fields that requests may have and that do nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: titles repeat the names."""
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Leaves the default out where it is null, which stands for a default that is not null."""
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """Closed, where the keys have a pattern."""
        described = super().dict_schema(schema)
        return described | ({"additionalProperties": False} if "patternProperties" in described else {})

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """With the fields that are not served and may be sent."""
        described = super().model_schema(schema)
        described.pop("title", None)
        model = schema["cls"]
        if issubclass(model, StrictModel):
            properties = described.setdefault("properties", {})
            for name in model.table.harmless:
                properties.setdefault(name, {"description": "It makes no difference."})
            for name in model.table.neutral:
                properties.setdefault(name, {"description": "Allowed where it asks for what is done anyway."})
        return described


def _schemas(model_name: str) -> Json:
    kinds = {kind for operation in (*OPERATIONS, *WITHOUT_PREFIX) for kind in operation.schemas}
    adapters = [(kind.__name__, "validation", TypeAdapter(kind)) for kind in sorted(kinds, key=_name)]
    _, described = TypeAdapter.json_schemas(
        adapters,  # type: ignore[arg-type]
        ref_template=_SCHEMAS + "{model}",
        schema_generator=_Generator,
    )
    schemas: Json = described["$defs"]
    for kind in {operation.body for operation in OPERATIONS if operation.body}:
        named = schemas[kind.__name__]
        # null stands for the only model there is.
        names = [model_name] if "model" in named.get("required", ()) else [model_name, None]
        named["properties"]["model"] = {"enum": names}
    return schemas


def _model_parameter(model_name: str) -> Json:
    return {"name": "model_id", "in": "path", "required": True, "schema": {"enum": [model_name]}}


def _name(kind: type[BaseModel]) -> str:
    return kind.__name__


def _path_item(operation: Operation) -> Json:
    described: Json = {method.lower(): _operation(operation, method) for method in operation.methods}
    if "{model_id}" in operation.path:
        described["parameters"] = [{"$ref": "#/components/parameters/model_id"}]
    return described


def _operation(operation: Operation, method: str) -> Json:
    has_content = method != "HEAD"
    described: Json = {"summary": operation.summary, "tags": [operation.tag]}
    if operation.query:
        described["parameters"] = [
            {"name": name, "in": "query", "schema": dict(schema)} for name, schema in operation.query.items()
        ]
    if operation.security is not None:
        described["security"] = [{name: []} for name in operation.security]
    if operation.body is not None:
        content = {"application/json": {"schema": _reference(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    responses: Json = {}
    for status, kind in operation.answers.items():
        responses[str(status)] = {
            "description": "The answer." if status == 200 else "Not now.",
            "headers": _headers("x-request-id", "openai-processing-ms", IGNORED_HEADER),
        }
        if has_content:
            responses[str(status)]["content"] = _content(operation, kind)
    for status in operation.errors:
        responses[str(status)] = {"$ref": f"#/components/responses/{_error_name(operation.error, status)}"}
    described["responses"] = responses
    return described


def _content(operation: Operation, kind: type[BaseModel]) -> Json:
    content: Json = {"application/json": {"schema": _reference(kind)}}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation, operation.event)}
    return content


def _event(operation: Operation, kind: type[BaseModel]) -> Json:
    """One event of a stream, in the way of OpenAPI 3.2; earlier ones have no words for streams."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(kind), _reference(operation.error)]},
    }
    return {
        "type": "object",
        "description": _NAMED_EVENTS if operation.has_named_events else _DATA_EVENTS,
        "properties": {"data": data, "event": {"type": "string"}},
        "required": ["data", "event"] if operation.has_named_events else ["data"],
    }


def _error_responses() -> Json:
    used = {
        (operation.error, status)
        for operation in (*OPERATIONS, *WITHOUT_PREFIX)
        for status in operation.errors
    }
    return {
        _error_name(kind, status): {
            "description": ERRORS[status],
            "headers": _headers("x-request-id", "openai-processing-ms", *_EXTRA_HEADERS.get(status, ())),
            "content": {"application/json": {"schema": _reference(kind)}},
        }
        for kind, status in sorted(used, key=lambda one: (one[0].__name__, one[1]))
    }


_RETRY = ("retry-after", "x-should-retry")
_EXTRA_HEADERS = {401: ("www-authenticate",), 429: _RETRY, 503: _RETRY}


def _error_name(kind: type[BaseModel], status: int) -> str:
    return f"{kind.__name__}_{status}"


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _reference(kind: type[BaseModel]) -> Json:
    return {"$ref": _SCHEMAS + kind.__name__}
