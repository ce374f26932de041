"""Who may call what, and how often: API keys, their limits, the admin key, and the closed door of one that stops."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from polyradix.serve.errors import ApiError

ADMIN = frozenset({"/flush_cache"})
OPEN = frozenset({"/health", "/metrics"})  # for probes and scrapers, which have no key


class KeyFileError(ValueError):
    """The API keys cannot be used; the message says why."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One client. Limits are per minute; None is no limit."""

    name: str
    key: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


def load_keys(path: Path) -> list[Key]:
    """`keys`, a list of Key, from TOML or JSON by the file's ending. Raises KeyFileError."""
    try:
        data = path.read_bytes()
        raw = msgspec.json.decode(data) if path.suffix == ".json" else tomllib.loads(data.decode())
        keys = msgspec.convert(raw, _KeyFile).keys
    except (OSError, ValueError) as error:  # msgspec's and tomllib's errors are ValueErrors; none repeats a key
        raise KeyFileError(f"api_key_file is '{path}', which cannot be used: {error}") from None
    for i, key in enumerate(keys):
        for name in ("requests_per_minute", "tokens_per_minute"):
            limit = getattr(key, name)
            if limit is not None and limit < 1:
                raise KeyFileError(f"{name} of key {key.name!r} is {limit}; expected an integer >= 1")
        if not key.key or not key.key.isascii() or not key.name:
            raise KeyFileError(f"keys[{i}] has a name or a key that is empty or not ASCII")
    return keys


class Bucket:
    """So many units a minute, as many at once. Paid for afterwards, so it may be overdrawn by what was under way."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._rate, self._clock = float(per_minute), per_minute / 60, clock
        self._level, self._at = self._most, clock()

    def wait(self) -> float:
        """Seconds until there is one unit, 0 if there is."""
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (1 - self._level) / self._rate)

    def take(self, units: int) -> None:
        self._level -= units


class Client:
    """A key with its buckets."""

    def __init__(self, key: Key) -> None:
        self.name = key.name
        self.digest = _digest(key.key.encode())
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self._buckets = {kind: Bucket(limit) for kind, limit in limits.items() if limit is not None}

    def admit(self) -> None:
        """Counts a request. Raises ApiError 429."""
        for kind, bucket in self._buckets.items():
            if wait := math.ceil(bucket.wait()):
                message = f"the limit of {kind} per minute of this API key is used up; try again in {wait} s"
                raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})
        self._take("requests", 1)

    def charge(self, tokens: int) -> None:
        self._take("tokens", tokens)

    def _take(self, kind: str, units: int) -> None:
        if kind in self._buckets:
            self._buckets[kind].take(units)


@dataclass
class Caller:
    """Of one HTTP request. `name` is the key's, empty for a server without keys."""

    client: Client | None = None
    headers: Mapping[str, str] = field(default_factory=dict)  # of a trace: traceparent, tracestate

    @property
    def name(self) -> str:
        return self.client.name if self.client else ""

    def charge(self, tokens: int) -> None:
        if self.client:
            self.client.charge(tokens)


CALLER: ContextVar[Caller] = ContextVar("CALLER", default=Caller())  # noqa: B039 (never changed)


class Access:
    """ASGI middleware. `closing` says whether new work is refused; `count` is told the status of each refusal."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[Key],
        admin_key: str | None,
        closing: Callable[[], bool],
        count: Callable[[int], None],
    ) -> None:
        self._app, self._closing, self._count = app, closing, count
        self._clients = [Client(key) for key in keys]
        self._admin = _digest(admin_key.encode()) if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            caller = self._judge(scope)
        except ApiError as error:
            self._count(error.status)
            return await error.response()(scope, receive, send)
        CALLER.set(caller)
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Caller:
        path, headers = scope["path"], dict(scope["headers"])
        trace = {name: headers[name.encode()].decode("latin-1") for name in TRACE if name.encode() in headers}
        client = self._client(path, _bearer(headers.get(b"authorization", b"")))
        if scope["method"] == "POST":
            if self._closing():
                raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "1"})
            if client is not None:
                client.admit()
        return Caller(client, trace)

    def _client(self, path: str, given: bytes) -> Client | None:
        """Whose key it is; None for the admin's, and where none is needed. Raises ApiError 401 or 403."""
        digest = _digest(given)
        admin = self._admin is not None and hmac.compare_digest(digest, self._admin)
        found = [client for client in self._clients if hmac.compare_digest(digest, client.digest)]  # looks at all
        if admin or path in OPEN:
            return None
        if path in ADMIN and (self._admin or self._clients):
            if self._admin is None:
                raise ApiError(
                    403, f"{path} is closed: the server was started without --admin-key", code="no_admin_key"
                )
            raise _unauthorized(f"{path} needs the admin key, as `Authorization: Bearer KEY`")
        if self._clients and not found:
            what = "the API key is not known" if given else "no API key was given"
            raise _unauthorized(f"{what}; expected a header `Authorization: Bearer KEY`")
        return found[0] if found else None


TRACE = ("traceparent", "tracestate")


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _bearer(value: bytes) -> bytes:
    kind, _, token = value.partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else b""


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def add_access(app: Any, server: Any) -> None:
    """Server's keys, and its CORS origins outside of them: a browser's preflight brings no key."""
    from starlette.middleware.cors import CORSMiddleware

    app.add_middleware(
        Access,
        keys=server.keys,
        admin_key=server.admin_key,
        closing=lambda: server.closing,
        count=lambda status: server.metrics.errors.labels(str(status)).inc(),
    )
    if server.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
