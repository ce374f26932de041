"""The OpenAPI document: routes that check their bodies themselves, so that errors are OpenAI's, still describe them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

PLACE = "#/components/schemas/{model}"
ERROR = {
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
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """`bodies` has the model of each POST route's JSON."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    refs, defs = models_json_schema([(m, "validation") for m in bodies.values()], ref_template=PLACE)
    document["components"] = {"schemas": defs["$defs"] | {"Error": ERROR}}
    for path, model in bodies.items():
        content = {"application/json": {"schema": refs[model, "validation"]}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    error = {"description": "Error", "content": {"application/json": {"schema": {"$ref": PLACE.format(model="Error")}}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"] |= {"4XX": error, "5XX": error}
    return document
