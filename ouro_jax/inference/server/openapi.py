"""The server described in OpenAPI 3.1, from the same schemas that bodies are checked with."""

from collections.abc import Mapping
from typing import Any

from ouro_jax.inference.server.protocol import Served, chat_schema, completion_schema
from ouro_jax.inference.server.schema import Schema

_ERRORS = {
    400: "The body is wrong; the error names the field.",
    401: "A key is asked for and this is not it.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests wait; try again after Retry-After seconds.",
    500: "The server failed.",
    503: "The engine failed.",
    504: "The answer took too long.",
}


def document(served: Served) -> dict[str, Any]:
    """The whole document for the model that is served."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"ouro serve: {served.name}", "version": "1"},
        "components": {
            "schemas": {"Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/completions": {
                "post": _post("Continue prompts.", completion_schema(served), "text_completion")
            },
            "/v1/chat/completions": {
                "post": _post("Answer a conversation.", chat_schema(served), "chat.completion")
            },
            "/v1/models": {"get": _get("The model served.", _json({"type": "object"}))},
            "/health": {"get": _get("Whether answers can be had.", _json({"type": "object"}), 503)},
            "/metrics": {"get": _get("Counters for Prometheus.", _text("text/plain"))},
            "/openapi.json": {"get": _get("This.", _json({"type": "object"}))},
            "/": {"get": _get("A page to talk to the model.", _text("text/html"))},
        },
    }


def _post(summary: str, body: Schema, kind: str) -> dict[str, Any]:
    choices = {"type": "array", "items": {"type": "object"}}
    whole = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage", "ouro"],
        "properties": {"object": {"const": kind}, "choices": choices},
    }
    content = {"application/json": {"schema": whole}, "text/event-stream": {"schema": {}}}
    good = {"description": "The answer; with stream = true as events.", "content": content}
    return {
        "summary": summary,
        "requestBody": {
            "required": True, "content": {"application/json": {"schema": _nullable(body)}},
        },
        "responses": {"200": good} | _errors(*_ERRORS),
    }  # fmt: skip


def _get(summary: str, content: Mapping[str, Any], *errors: int) -> dict[str, Any]:
    good = {"description": summary, "content": content}
    return {"summary": summary, "responses": {"200": good} | _errors(401, *errors)}


def _errors(*statuses: int) -> dict[str, Any]:
    content = _json({"$ref": "#/components/schemas/Error"})
    return {str(s): {"description": _ERRORS[s], "content": content} for s in statuses}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _text(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}


def _nullable(schema: Schema) -> dict[str, Any]:
    """An object's schema in which every field that may be absent may also be null."""
    required = schema["required"]
    fields = {
        name: field if name in required else {"anyOf": [_inside(field), {"type": "null"}]}
        for name, field in schema["properties"].items()
    }
    return {**schema, "properties": fields}


def _inside(field: Schema) -> Schema:
    return _nullable(field) if field.get("type") == "object" else field


def _error_schema() -> Schema:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe, "code": maybe}
    error = {
        "type": "object", "properties": fields, "required": list(fields),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
