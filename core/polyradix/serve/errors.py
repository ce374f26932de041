"""Errors as OpenAI's API words them, and the refusal of bodies that are not what a route expects."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

T = TypeVar("T", bound=BaseModel)
STALL_SECONDS = 30.0  # a body of which nothing comes for so long is given up, with the memory it holds
SHOWN = 80  # characters of a bad value that a message repeats


class ApiError(Exception):
    """Answered with `status` and OpenAI's error object. `param` is the request field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = headers
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {408: "timeout_error", 429: "rate_limit_error"}.get(self.status, kind)
        message = self.message.encode("utf-8", "replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def show(value: object) -> str:
    """A short repr."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def field_error(field: str, value: object, expected: str) -> ApiError:
    return ApiError(400, f"{field} is {show(value)}; expected {expected}", field)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, if it is JSON by its content type and has at most `limit` bytes; ApiError 415 or 413 otherwise, 408 if
    it stalls. Asking for the content type keeps web pages of other origins from posting to a local server unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type is {show(kind)}; expected application/json")
    parts: list[bytes] = []
    size, stream = 0, request.stream()
    try:
        while True:
            async with asyncio.timeout(STALL_SECONDS):
                part = await anext(stream, None)
            if part is None:
                break
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body has more than {limit} bytes, the limit of this server")
            parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"no more of the body came for {STALL_SECONDS:g} seconds", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client hung up before the body was complete") from None
    return b"".join(parts)


def parse(model: type[T], body: bytes) -> T:
    """The body as a `model`; ApiError 400 that names the field otherwise."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """Of the first field at fault, the innermost place, with all that was allowed there."""
    found: list[tuple[str, Any]] = [(_path(e["loc"]), e) for e in error.errors(include_url=False)]
    first = found[0][1]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return ApiError(400, "the body is not a JSON object")
    same = [(path, e) for path, e in found if e["loc"][0] == first["loc"][0]]
    path, deepest = max(same, key=lambda item: item[0].count("[") + item[0].count("."))
    wanted = list(dict.fromkeys(e["msg"] for p, e in same if p == path))
    if deepest["type"] == "missing":
        return ApiError(400, f"{path} is missing", path)
    return ApiError(400, f"{path} is {show(deepest['input'])}: {' or '.join(wanted)}", path)


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location, in which union members appear as if they were fields."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif "[" not in part and part not in ("str", "int", "float", "bool"):
            out += f".{part}" if out else part
    return out
