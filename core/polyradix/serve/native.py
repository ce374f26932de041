"""/generate: token ids in and out, or a request as SGLang's clients send it, which is answered as SGLang does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import ValidationError

from polyradix.serve import openai, reading
from polyradix.serve.answer import LEAST, Answer, Form, GenerateForm, answer
from polyradix.serve.errors import ApiError, field_error, show
from polyradix.serve.generation import Choice, Generation, Piece

if TYPE_CHECKING:
    from polyradix.serve.app import Server

SAME = {  # SGLang's names in sampling_params
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
}
NEW_TOKENS = 128  # SGLang's default


class GenerateRequest(openai.Sampling):
    """`input_ids`, or SGLang's `text`. With `text`, `sampling_params` or `return_logprob` the answer is SGLang's."""

    input_ids: list[int] | None = None
    text: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # so many alternatives of every prompt token but the first
    stop: str | list[str] | None = None
    sampling_params: dict[str, Any] | None = None
    return_logprob: bool | None = None
    top_logprobs_num: int | None = None

    @property
    def foreign(self) -> bool:
        return self.text is not None or self.sampling_params is not None or bool(self.return_logprob)


class SGLangReply(msgspec.Struct):
    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]


class SGLangForm(Form):
    """Each event of a stream has everything so far."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._started = time.monotonic()

    def piece(self, choice: Choice, piece: Piece) -> SGLangReply:
        self._pieces.append(piece)
        return self._body(choice, self._pieces)

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> SGLangReply:
        return self._body(run.choices[0], pieces[0])

    def last(self, run: Generation) -> None:
        return None

    def _body(self, choice: Choice, pieces: list[Piece]) -> SGLangReply:
        meta: dict[str, Any] = {
            "id": choice.rid,
            "finish_reason": _reason(choice, pieces[-1]),
            "prompt_tokens": len(choice.prompt),
            "completion_tokens": choice.output_tokens,
            "cached_tokens": choice.cached_tokens,
            "e2e_latency": time.monotonic() - self._started,
        }
        if choice.params.logprobs is not None:
            entries = [entry for piece in pieces for entry in piece.entries]
            meta["output_token_logprobs"] = [_token(e.logprob, token) for token, e in entries]
            if choice.params.logprobs:
                meta["output_top_logprobs"] = [[_token(value, token) for token, value in e.top] for _, e in entries]
        ids = [token for piece in pieces for token in piece.tokens]
        return SGLangReply("".join(piece.text for piece in pieces), ids, meta)


def _token(logprob: float, token: int) -> tuple[float, int, None]:
    return max(logprob, LEAST), token, None


def _reason(choice: Choice, last: Piece) -> dict[str, Any] | None:
    if last.finish is None:
        return None
    if last.finish == "length":
        return {"type": "length", "length": choice.output_tokens}
    return {"type": "stop", "matched": choice.stopped_by or next(iter(last.tokens[-1:]), None)}


async def generate(server: Server, body: GenerateRequest, started: float) -> Answer:
    if body.foreign:
        body = _translated(body)
    openai.refuse(body, openai.REFUSED_GENERATE)
    field, prompt = ("input_ids", body.input_ids) if body.text is None else ("text", body.text)
    if prompt is None:
        raise ApiError(400, "input_ids is missing", "input_ids")
    if body.text is not None and body.input_ids is not None:
        raise field_error("text", body.text, "nothing beside input_ids")
    ids = await server.tokens(prompt, field, body.truncate_prompt_tokens)
    top = body.prompt_logprobs
    form = SGLangForm() if body.foreign else GenerateForm()
    if top is not None and body.foreign:
        raise field_error("prompt_logprobs", top, "nothing beside SGLang's fields")
    silent = openai.silent(body, top is not None)
    most = NEW_TOKENS if body.foreign else 16
    choice = server.choice(0, ids, body, field, most, body.logprobs, openai.stops(body.stop))
    choice.silent = silent
    run = Generation(server.client, server.metrics, [choice], started)
    if top is None or not isinstance(form, GenerateForm):
        return answer(run, form, bool(body.stream))
    if not 0 <= top <= 20:
        raise field_error("prompt_logprobs", top, "an integer from 0 to 20")
    native = form

    async def before() -> None:
        (native.prompt_logprobs,) = await reading.prompt_logprobs(server.client, [ids], top)

    return answer(run, form, bool(body.stream), before)


def _translated(body: GenerateRequest) -> GenerateRequest:
    """SGLang's fields as ours. Raises ApiError 400 that names the field."""
    extra = body.model_extra or {}
    if extra.get("logprob_start_len") not in (None, -1):
        raise field_error("logprob_start_len", extra["logprob_start_len"], "-1; prompt_logprobs has the prompt's")
    given = {name: value for name, value in (body.sampling_params or {}).items() if value is not None}
    if (n := given.pop("n", 1)) != 1:
        raise field_error("sampling_params.n", n, "1")
    mine = body.model_dump(exclude_none=True) | {SAME.get(name, name): value for name, value in given.items()}
    if body.return_logprob:
        mine["logprobs"] = body.top_logprobs_num or 0
    try:
        return GenerateRequest.model_validate(mine)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = next((theirs for theirs, ours in SAME.items() if ours == first["loc"][0] and theirs in given), None)
        field = f"sampling_params.{name or first['loc'][0]}"
        raise ApiError(400, f"{field} is {show(first['input'])}: {first['msg']}", field) from None
