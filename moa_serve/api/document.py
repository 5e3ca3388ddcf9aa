"""The OpenAPI document: what FastAPI cannot know, as bodies are read by `read_json` and errors have one shape of their own."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from moa_serve.api.answers import ANSWERS

_REFERENCE = "#/components/schemas/{model}"
_bodies: dict[str, type[BaseModel]] = {}  # filled while routers are imported

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

GENERATED: dict[int | str, dict[str, Any]] = {200: {"description": "The answer, or its events.", "content": {"text/event-stream": {}}}}
"""`responses` of a route that can stream."""

EVENTS: dict[int | str, dict[str, Any]] = {200: {"description": "Events, until one side ends them.", "content": {"text/event-stream": {}}}}


def body_of(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `schema`."""
    _bodies[schema.__name__] = schema
    reference = {"$ref": _REFERENCE.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document, made once and kept by the application."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas: dict[str, Any] = {"Error": ERROR}
        for name, schema in (_bodies | {answer.__name__: answer for answer in ANSWERS.values()}).items():
            described = schema.model_json_schema(ref_template=_REFERENCE)
            schemas |= described.pop("$defs", {})
            schemas[name] = described
        document.setdefault("components", {})["schemas"] = schemas
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # none is needed where the server has no keys
        error = {"description": "Error", "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if (answer := ANSWERS.get((method, path))) is not None:
                    content = {"schema": {"$ref": _REFERENCE.format(model=answer.__name__)}}
                    operation["responses"]["200"]["content"]["application/json"] = content
                operation["responses"].pop("422", None)  # FastAPI's own, which is never sent
                operation["responses"]["default"] = error
        app.openapi_schema = document
    return app.openapi_schema
