"""The HTTP routes. Each one checks its body, turns prompts into token ids and hands a Generation to an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from polyradix import __version__
from polyradix.serve import native, openai, reading, text
from polyradix.serve.access import Key, add_access
from polyradix.serve.answer import Answer, ChatForm, CompletionForm, answer
from polyradix.serve.client import EngineClient
from polyradix.serve.document import describe
from polyradix.serve.errors import ApiError, field_error, parse, read_body
from polyradix.serve.generation import Choice, Generation, Tokens
from polyradix.serve.metrics import Metrics
from polyradix.serve.responses import ResponsesForm, ResponsesRequest, chat_request, field_name, renamed
from polyradix.serve.terms import terms
from polyradix.serve.tools import Formats, Talk

MAX_BODY = 32 * 2**20  # bytes
LONG_TEXT = 4096  # characters; longer texts are tokenized in a thread, so that streams do not stall
MANY_MESSAGES = 128  # more are rendered in a thread
SHRINK = 3  # a tokenizer's normal form of a text has at least a third of its bytes (Hangul, whose letters are joined)


@dataclass
class Server:
    """What the routes share. `name` is the model's name in the API."""

    client: EngineClient
    tokenizer: Tokens
    name: str
    max_body: int = MAX_BODY
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    max_prompt: int | None = None  # tokens
    max_tokens: int | None = None  # of output, what a request may ask for
    keys: Sequence[Key] = ()
    admin_key: str | None = None
    cors_origins: Sequence[str] = ()
    pooling: Literal["last", "mean"] | None = None  # of embeddings; None: there are none
    closing: bool = False  # new work is refused

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.client)
        self.created = int(time.time())
        self.formats = Formats(self.tokenizer, self.tool_parser, self.reasoning_parser)

    @property
    def context(self) -> int:
        """Tokens of one request, prompt and output; ApiError 503 while there is no engine."""
        if self.client.ready is None or self.client.error:
            raise ApiError(503, self.client.error or "the model is still loading", code="engine_unavailable")
        return min(self.client.ready.max_context, self.client.ready.max_prompt_tokens + 1)

    async def encode(self, text: str, add_special: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            await asyncio.sleep(0)  # there may be many
            return self.tokenizer.encode(text, add_special)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special)

    async def encode_prompt(self, text: str, add_special: bool, field: str, cut: int | None = None) -> list[int]:
        """With at most `cut` tokens, the last ones. Refuses, unread, what can only have more tokens than the context:
        megabytes take minutes."""
        if cut is None and len(text) > self.context * self.tokenizer.longest * SHRINK:
            message = f"the prompt has {len(text)} characters, too many for the context of {self.context} tokens"
            raise ApiError(400, message, field, "context_length_exceeded")
        return self.cut(await self.encode(text, add_special), cut)

    def cut(self, ids: list[int], most: int | None) -> list[int]:
        """The last `most`, truncate_prompt_tokens of a request; -1: as many as leave room for a token."""
        if most is None:
            return ids
        if most < 1 and most != -1:
            raise field_error("truncate_prompt_tokens", most, "an integer >= 1, or -1 for what fits")
        return ids[-(self.context - 1 if most == -1 else most) :]

    def choice(
        self,
        index: int,
        prompt: list[int],
        body: openai.Sampling,
        field: str,
        max_tokens: int,
        logprobs: int | None,
        stop: Sequence[str] = (),
        readable: bool = False,
    ) -> Choice:
        """Choice `index` of the request; the index is added to the seed. `field` holds the prompt, for errors.
        `readable`: for a parser, with the special tokens that it looks for."""
        room = self.check_length(prompt, field)
        if self.max_tokens is not None:
            if body.max_tokens is not None and body.max_tokens > self.max_tokens:
                raise field_error("max_tokens", body.max_tokens, f"at most {self.max_tokens}, this server's limit")
            room = min(room, self.max_tokens)
        params = openai.sampling(body, max_tokens, room, self.tokenizer.vocab_size, logprobs)
        if params.seed is not None and index:
            params = msgspec.structs.replace(params, seed=(params.seed + index + 2**63) % 2**64 - 2**63)
        if not params.ignore_eos:
            stops = tuple({*params.stop_token_ids, *self.tokenizer.eos_ids})
            params = msgspec.structs.replace(params, stop_token_ids=stops)
        words = self.formats.view if readable else self.tokenizer
        show = bool(body.include_stop_str_in_output), body.skip_special_tokens is False
        return Choice(index, prompt, params, words, stop, *show, terms=terms(body))

    def text(self, ids: list[int]) -> str:
        """Of tokens, special ones included."""
        return b"".join(map(self.tokenizer.token_bytes, ids)).decode("utf-8", "replace")

    def check_length(self, prompt: list[int], field: str, output: int = 1) -> int:
        """Tokens of the context that are left; ApiError 400 if there are not `output`, or the prompt is too long."""
        context = self.context
        if not prompt:
            raise field_error(field, prompt, "at least one token")
        if len(prompt) + output > context:
            more = "with at least one token of output that" if output else "that"
            message = f"the prompt has {len(prompt)} tokens; {more} is more than the context of {context} tokens"
            raise ApiError(400, message, field, "context_length_exceeded")
        if self.max_prompt is not None and len(prompt) > self.max_prompt:
            message = f"the prompt has {len(prompt)} tokens; this server takes at most {self.max_prompt}"
            raise ApiError(400, message, field, "context_length_exceeded")
        return context - len(prompt)

    async def tokens(
        self, prompt: str | list[int], field: str, cut: int | None = None, special: bool = True
    ) -> list[int]:
        if isinstance(prompt, str):
            return await self.encode_prompt(prompt, special, field, cut)
        return self.cut(self.check_ids(prompt, field), cut)

    async def chat_text(self, body: openai.ChatRequest) -> tuple[Talk, str]:
        """What the chat template makes of a request."""
        talk = Talk(self.formats, body)
        messages = talk.adapted(openai.chat_messages(body))
        text = await self.render(messages, talk.variables | openai.template_variables(body))
        return talk, openai.unfinished(text, messages) if body.continue_final_message else text

    async def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The chat template's text; ApiError 400 if it rejects the messages."""
        render = partial(self.tokenizer.chat_prompt, messages, **variables)
        try:
            return render() if len(messages) <= MANY_MESSAGES else await asyncio.to_thread(render)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), "messages") from error

    def check_ids(self, ids: list[int], field: str) -> list[int]:
        vocab = self.tokenizer.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise field_error(field, token, f"token ids from 0 to {vocab - 1}")
        return ids


async def chat(server: Server, body: openai.ChatRequest, started: float) -> Answer:
    choices = await _chat_choices(server, body)
    form = ChatForm(server.name, server.tokenizer, *_usage(body))
    return answer(Generation(server.client, server.metrics, choices, started), form, bool(body.stream))


async def respond(server: Server, body: ResponsesRequest, started: float) -> Answer:
    try:
        (choice,) = await _chat_choices(server, chat_request(body))
    except ApiError as error:
        raise renamed(error) from None
    if (spec := choice.params.grammar) is not None:
        spec = msgspec.structs.replace(spec, field=field_name(spec.field))
        choice.params = msgspec.structs.replace(choice.params, grammar=spec)
    form = ResponsesForm(server.name, body)
    return answer(Generation(server.client, server.metrics, [choice], started), form, bool(body.stream))


async def _chat_choices(server: Server, body: openai.ChatRequest) -> list[Choice]:
    openai.refuse(body, openai.REFUSED_CHAT)
    openai.check_common(body, server.name)
    if body.max_completion_tokens is not None:
        if body.max_completion_tokens < 1:
            raise field_error("max_completion_tokens", body.max_completion_tokens, "an integer >= 1")
        body.max_tokens = body.max_completion_tokens
    logprobs, stop = openai.chat_logprobs(body), openai.stops(body.stop)
    talk, text = await server.chat_text(body)
    prompt = await server.encode_prompt(text, False, "messages", body.truncate_prompt_tokens)
    rest = prompt, body, "messages", server.context, logprobs, stop, not talk.plain
    choices = [server.choice(i, *rest) for i in range(body.n or 1)]
    for choice in choices:
        talk.attach(choice, text)
    return choices


async def completion(server: Server, body: openai.CompletionRequest, started: float) -> Answer:
    openai.refuse(body, openai.REFUSED_COMPLETION)
    openai.check_common(body, server.name)
    logprobs, stop = openai.completion_logprobs(body), openai.stops(body.stop)
    given, n, best_of = openai.prompts(body.prompt, "prompt"), body.n or 1, openai.best_of(body)
    if len(given) * best_of > openai.MAX_CHOICES:
        raise field_error(
            "prompt", f"{len(given)} prompts, n {best_of}", f"at most {openai.MAX_CHOICES} choices in a request"
        )
    silent, cut = openai.silent(body, bool(body.echo)), body.truncate_prompt_tokens
    wanted = 0 if logprobs is None and best_of > n else logprobs
    choices: list[Choice] = []
    echoes: list[list[Choice]] = []  # by prompt
    for prompt in given:
        ids = await server.tokens(prompt, "prompt", cut, body.add_special_tokens is not False)
        new = [server.choice(len(choices) + i, ids, body, "prompt", 16, wanted, stop) for i in range(best_of)]
        for choice in new if body.echo else ():
            choice.echo = prompt if isinstance(prompt, str) and cut is None else server.text(ids)
            choice.silent = silent
        choices += new
        echoes += [new] if body.echo and logprobs is not None else []
    form = CompletionForm(server.name, server.tokenizer, *_usage(body), n, best_of, logprobs is not None)

    async def before() -> None:
        found = await reading.prompt_logprobs(server.client, [same[0].prompt for same in echoes], logprobs or 0)
        for same, logs in zip(echoes, found, strict=True):
            for choice in same:
                choice.echo_logprobs(logs)

    return answer(
        Generation(server.client, server.metrics, choices, started), form, bool(body.stream), before if echoes else None
    )


def _usage(body: openai.OpenAIBody) -> tuple[bool, bool]:
    """Whether a stream ends with it, and whether each chunk has it."""
    asked = body.stream_options
    end = asked is not None and bool(asked.include_usage)
    return end, end and asked is not None and bool(asked.continuous_usage_stats)


def make_app(server: Server) -> FastAPI:
    app = FastAPI(title="Polyradix", version=__version__)
    _add_generation(app, server)
    _add_state(app, server)
    _add_errors(app, server)
    add_access(app, server)
    return app


def _add_generation(app: FastAPI, server: Server) -> None:
    routes: Sequence[tuple[str, type[BaseModel], Any]] = (
        ("/v1/chat/completions", openai.ChatRequest, chat),
        ("/v1/responses", ResponsesRequest, respond),
        ("/v1/completions", openai.CompletionRequest, completion),
        ("/generate", native.GenerateRequest, native.generate),
        ("/v1/embeddings", reading.EmbeddingRequest, reading.embeddings),
        ("/tokenize", text.TokenizeRequest, text.tokenize),
        ("/detokenize", text.DetokenizeRequest, text.detokenize),
    )
    for path, model, run in routes:

        def route(model: type[BaseModel] = model, run: Any = run) -> Any:
            async def handle(request: Request) -> Response:
                started = time.monotonic()
                body = await read_body(request, server.max_body)
                result: Response = await run(server, parse(model, body), started)
                return result

            return handle

        app.post(path, name=run.__name__, response_model=None)(route())
    describe(app, {path: model for path, model, _ in routes})


def _add_state(app: FastAPI, server: Server) -> None:
    model = {"id": server.name, "object": "model", "created": server.created, "owned_by": "polyradix"}

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return text.json({"object": "list", "data": [_model()]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> Response:
        if name != server.name:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {server.name!r}", "model", "model_not_found"
            )
        return text.json(_model())

    def _model() -> dict[str, Any]:
        ready = server.client.ready
        return model | ({"max_model_len": server.context} if ready and not server.client.error else {})

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if server.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return text.json({"status": "ok", "max_context": server.context})

    @app.get("/health_generate", response_model=None)
    async def health_generate() -> Response:
        return await text.health_generate(server)

    @app.get("/server_info", response_model=None)
    async def server_info() -> Response:
        ready = server.client.ready
        info: dict[str, Any] = {"version": __version__, "model": server.name, "context": server.context}
        return text.json(info | (ready.info if ready else {}) | {"stats": msgspec.structs.asdict(server.client.stats)})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/flush_cache", response_model=None)
    async def flush_cache() -> Response:
        assert server.context
        server.client.flush_cache()
        return text.json({"status": "ok"})


def _add_errors(app: FastAPI, server: Server) -> None:
    def reply(error: ApiError) -> Response:
        server.metrics.errors.labels(str(error.status)).inc()
        return error.response()

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return reply(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        response = reply(ApiError(error.status_code, what))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return reply(ApiError(500, "internal error; the server's log has the details"))
