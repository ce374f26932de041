"""`polyradix serve`: the socket first, then the tokenizer, the engine process and the HTTP server around them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn

from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.messages import Ready
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.serve import tracing
from polyradix.serve.access import Key, load_keys
from polyradix.serve.app import MAX_BODY, Server, make_app
from polyradix.serve.client import EngineClient, EngineProcess

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05


class AddressError(OSError):
    """The address cannot be listened on."""


@dataclass(frozen=True)
class ServeOptions:
    host: str = "127.0.0.1"
    port: int = 30000  # 0: any free one
    name: str | None = None  # the model's name in the API; None: as it was given
    log_level: str = "info"
    max_body: int = MAX_BODY  # bytes
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    max_prompt: int | None = None  # tokens
    max_tokens: int | None = None  # of output, what a request may ask for
    api_keys: tuple[str, ...] = ()  # each a key without limits
    api_key_file: Path | None = None
    admin_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    drain_seconds: float = 30.0  # running requests may go on for this long after a signal
    pooling: Literal["last", "mean"] | None = None  # of embeddings
    otlp_endpoint: str | None = None  # where spans go

    def keys(self) -> list[Key]:
        """Raises KeyFileError."""
        named = load_keys(self.api_key_file) if self.api_key_file else []
        return named + [Key(f"key{i}", key) for i, key in enumerate(self.api_keys)]


def listen(host: str, port: int) -> socket.socket:
    """A bound and listening socket. Raises AddressError."""
    with contextlib.ExitStack() as failed:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = failed.enter_context(socket.socket(family, kind, proto))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(2048)
        except (OSError, OverflowError) as error:
            raise AddressError(f"cannot listen on {host}:{port}: {error}") from None
        failed.pop_all()
    return sock


def serve(config: EngineConfig, options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError, KeyFileError, AddressError, ModelError, CheckpointError, or
    EngineDead with the engine's own reason, when it cannot start."""
    config.check()
    keys, tls = options.keys(), _tls(options)
    if options.otlp_endpoint is not None:
        tracing.start(options.otlp_endpoint)
    with contextlib.closing(listen(options.host, options.port)) as sock:
        checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=config.revision)
        tokenizer = load_tokenizer(checkpoint)
        client = EngineClient(EngineProcess(config, options.log_level))
        server = Server(
            client,
            tokenizer,
            options.name or config.model,
            options.max_body,
            options.tool_parser,
            options.reasoning_parser,
            max_prompt=options.max_prompt,
            max_tokens=options.max_tokens,
            keys=keys,
            admin_key=options.admin_key,
            cors_origins=options.cors_origins,
            pooling=options.pooling,
        )
        http = _Http(
            server,
            options.drain_seconds,
            uvicorn.Config(
                make_app(server),
                log_config=None,
                access_log=options.log_level == "debug",
                timeout_graceful_shutdown=2,
                timeout_keep_alive=60,
                lifespan="off",
                **tls,
            ),
        )
        factory = http.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_serve(http, sock, client, config))
    tracing.stop()


class _Http(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again when it is done, and the exit code would not be 0."""

    def __init__(self, server: Server, drain_seconds: float, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._server, self._drain_seconds = server, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """New work is refused, what runs may finish in time, the rest gets an error; at once when asked again."""
        if self._draining is None:
            self._server.closing = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._drain_seconds = 0

    async def _drain(self) -> None:
        client, begin = self._server.client, time.monotonic()
        while client.busy and time.monotonic() - begin < self._drain_seconds:
            await asyncio.sleep(POLL_SECONDS)
        client.refuse()
        self.should_exit = True


def _tls(options: ServeOptions) -> dict[str, Any]:
    """Uvicorn's options. Raises ConfigError."""
    cert, key = options.ssl_certfile, options.ssl_keyfile
    if cert is None:
        if key is not None:
            raise ConfigError(f"ssl_keyfile is '{key}' without ssl_certfile; expected both")
        return {}
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except OSError as error:  # SSLError is one
        raise ConfigError(f"ssl_certfile '{cert}' and ssl_keyfile '{key}' cannot be used: {error}") from None
    return {"ssl_certfile": str(cert)} | ({"ssl_keyfile": str(key)} if key else {})


async def _serve(http: _Http, sock: socket.socket, client: EngineClient, config: EngineConfig) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, http.stop)
    await client.start()
    serving = asyncio.create_task(http.serve(sockets=[sock]))
    starting = asyncio.create_task(client.wait_ready())
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            log.info(_ready_line(sock, starting.result(), config, "https" if http.config.is_ssl else "http"))
            await serving
    finally:
        starting.cancel()
        http.should_exit = True
        await asyncio.gather(serving, starting, return_exceptions=True)
        await client.close()


def _ready_line(sock: socket.socket, ready: Ready, config: EngineConfig, scheme: str) -> str:
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    info = ready.info
    emulated = ", emulated" if info.get("emulated") else ""
    return (
        f"ready at {scheme}://{host}:{port}: {config.model} on {info.get('device', config.device)}{emulated}, "
        f"{info.get('dtype', config.dtype)}, context {ready.max_context}"
    )
