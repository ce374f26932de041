"""`polyradix.Engine`: the same engine in this process, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from polyradix.backend.protocol import Backend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.detokenizer import Detokenizer
from polyradix.engine.messages import Chunk, FinishReason, TokenLogProbs
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.schedule.params import SamplingParams

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One finished request. `tokens` holds every sampled id, also the one that stopped it; `text` does not."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    logprobs: list[TokenLogProbs] = field(default_factory=list)
    error: str = ""


class Engine:
    """Loads a model and generates. Options are EngineConfig's; raises the errors of EngineCore.

    Example: `Engine("demo").generate("Once upon a time", max_tokens=32)[0].text`.
    """

    def __init__(self, model: str, *, backend: Backend | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, **options)
        checkpoint = open_checkpoint(model, load_format=config.load_format)
        self.tokenizer = load_tokenizer(checkpoint)
        self.core = EngineCore(config, backend, checkpoint)
        self._count = 0

    def chat(self, messages: list[dict[str, Any]], *, stop: Sequence[str] = (), **params: Any) -> Completion:
        """The assistant's next turn, from the model's chat template."""
        tokens = self.tokenizer.encode(self.tokenizer.chat_prompt(messages), add_special=False)
        return self.generate([tokens], stop=stop, **params)[0]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, stop: Sequence[str] = (), **params: Any
    ) -> list[Completion]:
        """Completes all prompts together, in order. `params` are SamplingParams' fields; `stop` ends a completion
        before the first of these strings. Raises InvalidParam; if one prompt is refused, none is run."""
        sampling = msgspec.convert(params, SamplingParams, strict=False)
        if not sampling.ignore_eos:
            stops = tuple({*sampling.stop_token_ids, *self.tokenizer.eos_ids})
            sampling = msgspec.structs.replace(sampling, stop_token_ids=stops)
        done: dict[str, Completion] = {}
        texts: dict[str, Detokenizer] = {}
        try:
            for prompt in _as_list(prompts):
                rid = f"offline-{self._count}"
                self._count += 1
                tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                self.core.submit(rid, np.array(tokens, np.int32), sampling)
                done[rid] = Completion(prompt_tokens=len(tokens))
                texts[rid] = Detokenizer(self.tokenizer, stop)
            while self.core.has_work:
                for chunk in self.core.step():
                    self._take(chunk, done[chunk.rid], texts[chunk.rid])
        finally:
            for rid, completion in done.items():
                if completion.finish is None:
                    self.core.abort(rid)
        return list(done.values())

    def _take(self, chunk: Chunk, completion: Completion, text: Detokenizer) -> None:
        if completion.finish is not None:  # a stop string ended it; the engine's last words come too late
            return
        completion.cached_tokens = chunk.cached_tokens
        completion.error = chunk.error
        visible = chunk.tokens if chunk.stop_token is None else chunk.tokens[:-1]
        more, used = text.take(visible)
        completion.text += more
        count = used if text.stopped else len(chunk.tokens)
        completion.tokens += chunk.tokens[:count]
        completion.logprobs += (chunk.logprobs or [])[:count]
        if text.stopped:
            completion.finish = "stop"
            self.core.abort(chunk.rid)
        elif chunk.finish is not None:
            completion.text += text.finish()
            completion.finish = "stop" if text.stopped else chunk.finish


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
