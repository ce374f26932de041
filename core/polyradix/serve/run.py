"""`polyradix serve`: the socket first, then the tokenizer, the engine process and the HTTP server around them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from polyradix.engine.config import EngineConfig
from polyradix.engine.messages import Ready
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.serve.app import MAX_BODY, Server, make_app
from polyradix.serve.client import EngineClient, EngineProcess

log = logging.getLogger(__name__)
DRAIN_SECONDS = 5  # running requests may go on for this long after a signal


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


def listen(host: str, port: int) -> socket.socket:
    """A bound and listening socket. Raises AddressError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        raise AddressError(f"cannot listen on {host}:{port}: {error}") from None
    return sock


def serve(config: EngineConfig, options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError, AddressError, ModelError, CheckpointError, or EngineDead with
    the engine's own reason, when it cannot start."""
    config.check()
    with contextlib.closing(listen(options.host, options.port)) as sock:
        tokenizer = load_tokenizer(open_checkpoint(config.model, load_format=config.load_format))
        client = EngineClient(EngineProcess(config, options.log_level))
        parsers = options.tool_parser, options.reasoning_parser
        server = Server(client, tokenizer, options.name or config.model, options.max_body, *parsers)
        http = _Http(
            uvicorn.Config(
                make_app(server),
                log_config=None,
                access_log=options.log_level == "debug",
                timeout_graceful_shutdown=DRAIN_SECONDS + 2,
                timeout_keep_alive=60,
                lifespan="off",
            )
        )
        factory = http.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_serve(http, sock, client, config))


class _Http(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again when it is done, and the exit code would not be 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self, client: EngineClient) -> None:
        """First no new connections, then an error for whoever is not done in time; at once when asked again."""
        if self.should_exit:
            client.refuse()
        else:
            asyncio.get_running_loop().call_later(DRAIN_SECONDS, client.refuse)
        self.should_exit = True


async def _serve(http: _Http, sock: socket.socket, client: EngineClient, config: EngineConfig) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, http.stop, client)
    await client.start()
    serving = asyncio.create_task(http.serve(sockets=[sock]))
    starting = asyncio.create_task(client.wait_ready())
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            log.info(_ready_line(sock, starting.result(), config))
            await serving
    finally:
        starting.cancel()
        http.should_exit = True
        await asyncio.gather(serving, starting, return_exceptions=True)
        await client.close()


def _ready_line(sock: socket.socket, ready: Ready, config: EngineConfig) -> str:
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    info = ready.info
    emulated = ", emulated" if info.get("emulated") else ""
    return (
        f"ready at http://{host}:{port}: {config.model} on {info.get('device', config.device)}{emulated}, "
        f"{info.get('dtype', config.dtype)}, context {ready.max_context}"
    )
