"""Sampling parameters of one request, as the engine sees them: token ids only, text stays in front of the engine."""

from __future__ import annotations

import math

import msgspec

from polyradix.grammar.spec import GrammarError, GrammarSpec


class InvalidParam(ValueError):
    """A request field with a value it cannot have. `param` is the field's name in the API."""

    def __init__(self, param: str, value: object, expected: str) -> None:
        super().__init__(f"{param} is {value!r}; expected {expected}")
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults are OpenAI's. `seed` None draws one per request. `logprobs` None is off, n gives the chosen token's and
    the n best. `min_tokens` come before a stop token may."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: GrammarSpec | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0

    @property
    def adjusting(self) -> str:
        """The first field that changes logits; "" if none does."""
        fields = ("frequency_penalty", "presence_penalty", "logit_bias", "min_tokens")
        on = [name for name in fields if getattr(self, name)]
        return next(iter(on), "repetition_penalty" if self.repetition_penalty != 1 else "")

    def check(self) -> None:
        """Raises InvalidParam for the first field out of range."""
        rules: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens >= 1, "an integer >= 1"),
            ("temperature", 0 <= self.temperature <= 2, "a number from 0 to 2"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", -1 <= self.top_k < 2**31, "an integer >= 0 (0 or -1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("seed", self.seed is None or abs(self.seed) < 2**63, "a 64-bit integer"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number from -2 to 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number from -2 to 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100"),
            ("logit_bias", all(-100 <= v <= 100 for v in self.logit_bias.values()), "numbers from -100 to 100"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens ({self.max_tokens})"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "an integer from 0 to 20"),
        )
        for name, good, expected in rules:
            value = getattr(self, name)
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise InvalidParam(name, value, expected)
        if self.grammar is not None:
            try:
                self.grammar.check()
            except GrammarError as error:
                raise InvalidParam(self.grammar.field, self.grammar.kind, str(error)) from None
