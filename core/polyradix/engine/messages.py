"""What passes between the HTTP process and the engine process: msgpack through msgspec, one ZMQ frame a message."""

from __future__ import annotations

from typing import Literal

import msgspec

from polyradix.schedule.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Submit(msgspec.Struct, tag=True):
    """A new request. `tokens` is the prompt, int32 little-endian. `namespace` separates prefix caches; the lower
    `priority` is the more important; `timeout` is in seconds; `tenant` is whom fairness counts it for."""

    rid: str
    tokens: bytes
    params: SamplingParams
    namespace: str = ""
    priority: int = 0
    timeout: float | None = None
    tenant: str = ""


class Read(msgspec.Struct, tag=True):
    """A forward pass over a prompt (tokens as in Submit), answered by one Chunk: its `embedding`, of the last token or
    the mean of all; or `logprobs` of every token after the first, with the `top` best."""

    rid: str
    tokens: bytes
    want: Literal["last", "mean", "logprobs"]
    top: int = 0


class Abort(msgspec.Struct, tag=True):
    """Stop a request and free its pages. Unknown ids are ignored: it may just have finished."""

    rid: str


class FlushCache(msgspec.Struct, tag=True):
    """Forget all cached prefixes not in use."""


class TokenLogProbs(msgspec.Struct, array_like=True):
    """Of one output token: its logprob, and the best alternatives as (id, logprob), descending."""

    logprob: float
    top: list[tuple[int, float]]


class Chunk(msgspec.Struct, tag=True):
    """New output tokens of a request; the last one carries `finish`. `error` explains finish == "error", and `param`
    names the request field at fault when there is one (then it is the client's error)."""

    rid: str
    tokens: list[int]
    logprobs: list[TokenLogProbs] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None  # the stop token id that ended it; also the last of `tokens`
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    param: str = ""
    code: Literal["", "queue_full", "timeout"] = ""  # why, where it is neither the client's error nor ours
    embedding: bytes = b""  # float32 little-endian, of length 1
    queue_seconds: float = 0.0  # from submission to first admission


class Chunks(msgspec.Struct, tag=True):
    """All chunks of one step, in one message."""

    chunks: list[Chunk]


class Ready(msgspec.Struct, tag=True):
    """Sent once when the engine can serve. `info` is what /server_info shows (device, dtype, pages, capabilities)."""

    max_context: int
    max_prompt_tokens: int
    info: dict[str, str | int | float | bool]


class Failed(msgspec.Struct, tag=True):
    """The engine could not start, or died. `error` is for a person."""

    error: str


class Stats(msgspec.Struct, tag=True):
    """Sent about once a second and on change to idle; counters are totals since the start."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0  # held by running requests
    pages_cached: int = 0  # held by the tree only, evictable
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    retracted: int = 0
    refused: int = 0
    expired: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # total wall time of steps
    host_seconds: float = 0.0  # the share of it that was not kernels
    grammar_seconds: float = 0.0  # spent on masks
    jumped_tokens: int = 0  # forced by grammars and not sampled


ToEngine = Submit | Read | Abort | FlushCache
FromEngine = Chunks | Ready | Failed | Stats
