"""Grammars through llguidance, which is imported by the first request that needs it.

Limits: a source has MAX_SOURCE bytes at most, the library's own fuel bounds the work and the memory of what it makes of
it, and what is not compiled LIMIT_SECONDS after it was asked for is refused. The library cannot be interrupted, so what
was begun runs to its end on its thread. Large sources have a thread of their own: a flood of them delays no small one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

import numpy as np

from polyradix.backend.batch import I32
from polyradix.grammar.bounds import check_complement, check_multiples
from polyradix.grammar.exact import Exact
from polyradix.grammar.spec import Grammar, GrammarError, GrammarSpec, Matcher, Vocabulary
from polyradix.grammar.tags import lark

LIMIT_SECONDS = 0.8
SMALL = 4096  # bytes
QUEUE = 32  # grammars that wait for one thread
MASK_THREADS = min(8, os.cpu_count() or 1)
USERS = 4  # outputs on a lexer before the next one gets one more
CHEAP_SECONDS = 0.002  # what a lexer may cost the step loop, to which it is added
CACHED = 64  # grammars; the largest lexers have some 2 kB a state
MAX_FORCED = 16 * 1024  # bytes that a grammar may force at its start; more is a schema that never ends
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "max_grammar_size": 50_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# One spelling of JSON: keys are then forced whole, and a model cannot write white space without end.
JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


class LlgCompiler:
    """A Compiler for a model with `vocab` logits. `load` gives its tokenizer, once, on the compiler's thread. `eos` are
    further ids that end an output, besides the tokenizer's own."""

    def __init__(self, load: Callable[[], Vocabulary], vocab: int, eos: frozenset[int] = frozenset()) -> None:
        self._load, self._vocab, self._eos = load, vocab, eos
        self._lanes = [ThreadPoolExecutor(1, f"grammar-{size}") for size in ("small", "large")]
        self._fillers = ThreadPoolExecutor(MASK_THREADS, "mask")
        self._pending: list[tuple[Future[Grammar], float, bool]] = []  # since when, and whether in the large lane
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._tokenizer: Any = None
        self._ready: float | None = None  # since when there is a tokenizer
        self._specials: dict[str, int] = {}
        self._cache: OrderedDict[tuple[str, str, str], Future[Grammar]] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> Future[Grammar]:
        key = spec.kind, spec.source, spec.frame
        with self._lock:
            work = self._cache.get(key)
            if work is None or _worn(work):
                work = Future()
                lane = len(spec.source) > SMALL
                if sum(large == lane and not waiting.done() for waiting, _, large in self._pending) >= QUEUE:
                    work.set_exception(GrammarError("too many others wait to be compiled; try again"))
                    return work
                self._cache[key] = work
                self._pending.append((work, time.monotonic(), lane))
                self._lanes[lane].submit(self._run, spec, work)
            self._cache.move_to_end(key)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return work

    def expire(self) -> None:
        with self._lock:
            self._pending = [entry for entry in self._pending if not entry[0].done()]
            if self._ready is not None:
                now = time.monotonic()
                for work, since, _ in self._pending:
                    if now - max(since, self._ready) > LIMIT_SECONDS:
                        late = f"compiling it, or waiting for others, took longer than {LIMIT_SECONDS} s; simplify it"
                        _set(work, GrammarError(late))

    def fill(self, rows: Sequence[tuple[int, Matcher]], mask: I32) -> list[tuple[int, GrammarError]]:
        """Matchers that share a lexer wait for each other, so each lexer's are filled in turn."""
        groups: dict[int, list[tuple[int, Matcher]]] = {}
        for row, matcher in rows:
            groups.setdefault(matcher.lexer if isinstance(matcher, _Matcher) else id(matcher), []).append(
                (row, matcher)
            )
        each = partial(_fill, mask=mask)
        parts = self._fillers.map(each, groups.values()) if len(groups) > 1 else map(each, groups.values())
        return [failed for part in parts for failed in part]

    def close(self) -> None:
        for lane in (*self._lanes, self._fillers):
            lane.shutdown(wait=True, cancel_futures=True)

    def _run(self, spec: GrammarSpec, work: Future[Grammar]) -> None:
        """What comes too late is for whoever asks again; what nobody waits for any more is not begun."""
        try:
            tokenizer = self._made()
        except Exception as error:  # whatever a tokenizer's files or the library may raise
            _set(work, GrammarError(f"this model's tokenizer cannot be used with grammars: {error}"))
            return
        key = spec.kind, spec.source, spec.frame
        if work.done():
            with self._lock:
                if self._cache.get(key) is work:
                    del self._cache[key]
            return
        try:
            grammar: Grammar | GrammarError = _Compiled(tokenizer, spec, self._specials)
        except GrammarError as error:
            grammar = error
        if not _set(work, grammar):
            done: Future[Grammar] = Future()
            _set(done, grammar)
            with self._lock:
                self._cache[key] = done

    def _made(self) -> Any:
        with self._making:
            if self._tokenizer is None:
                words = self._load()
                names = {
                    words.token_bytes(i).decode("utf-8", "replace"): i for i in words.special_ids if i < self._vocab
                }
                self._specials = {name: i for name, i in names.items() if name}
                self._tokenizer = _tokenizer(words, self._vocab, self._eos)
                self._ready = time.monotonic()
            return self._tokenizer


def _fill(rows: Sequence[tuple[int, Matcher]], mask: I32) -> list[tuple[int, GrammarError]]:
    failed = []
    for row, matcher in rows:
        try:
            matcher.fill(mask[row])
        except GrammarError as error:
            failed.append((row, error))
    return failed


def _worn(work: Future[Grammar]) -> bool:
    grammar = work.result() if work.done() and work.exception() is None else None
    return isinstance(grammar, _Compiled) and grammar.worn


def _set(work: Future[Grammar], value: Grammar | GrammarError) -> bool:
    """False if it had a value already."""
    try:
        if isinstance(value, GrammarError):
            work.set_exception(value)
        else:
            work.set_result(value)
    except Exception:
        return False
    return True


def _tokenizer(words: Vocabulary, vocab: int, eos: frozenset[int]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(i for i in {*words.eos_ids, *eos} if i < vocab)
    if not ends:
        raise ValueError("it has no end-of-sequence token")

    class Words:
        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = ends[0], None
            self.tokens = [words.token_bytes(i) for i in range(vocab)]
            self.special_token_ids = sorted(i for i in {*words.special_ids, *ends} if i < vocab)

        def __call__(self, text: str | bytes) -> list[int]:
            return encode(text if isinstance(text, str) else text.decode())

    encode = lru_cache(1024)(Exact(words))  # the same keys are forced again and again
    return LLTokenizer(TokenizerWrapper(Words()), n_vocab=vocab, eos_token=ends)


class _Compiled:
    def __init__(self, tokenizer: Any, spec: GrammarSpec, specials: dict[str, int]) -> None:
        from llguidance import LLMatcher, LLParserLimits

        try:
            source = _framed(_source(spec, specials), spec.frame)
        except GrammarError:
            raise
        except Exception as error:  # the library's converters raise ValueError, RecursionError and their own
            raise GrammarError(_short(str(error))) from error
        self.worn = False
        self.fresh = partial(LLMatcher, tokenizer, source, log_level=0, limits=LLParserLimits(**LIMITS))
        begin = time.thread_time()
        first = self.fresh()
        self._cheap = time.thread_time() - begin < CHEAP_SECONDS
        self._lexers: list[tuple[Any, WeakSet[_Matcher]]] = [(first, WeakSet())]
        if not first.is_error():
            for _ in range(2):  # the first mask may pass and leave a lexer that is too large for any other
                _Matcher(first.deep_copy(), None, 0).fill(np.zeros(-(-tokenizer.vocab_size // 32), np.int32))
            if len(first.compute_ff_bytes()) > MAX_FORCED:
                raise GrammarError("no output of finite length can match it")
        if first.is_error():
            raise GrammarError(_short(first.get_error()))

    def matcher(self) -> _Matcher:
        """On the lexer with the fewest, or on one more: masks of different lexers are made side by side."""
        first, users = min(self._lexers, key=lambda lexer: len(lexer[1]))
        if len(users) >= USERS and self._cheap and len(self._lexers) < MASK_THREADS:
            first, users = self.fresh(), WeakSet()
            self._lexers.append((first, users))
        matcher = _Matcher(first.deep_copy(), self, id(first))
        users.add(matcher)
        return matcher


class _Matcher:
    """Copies of a matcher share its lexer, whose states are limited: what one output has used up fails all others. Then
    each goes on with a lexer of its own, and nobody new gets the old one. `shared` is None once that is done."""

    def __init__(self, inner: Any, shared: _Compiled | None, lexer: int) -> None:
        self._inner, self._shared, self.lexer = inner, shared, lexer
        self._taken: list[int] = []

    def fill(self, row: I32) -> None:
        if not row.flags.c_contiguous or row.dtype != np.int32:
            raise ValueError(f"row is {row.dtype}; expected contiguous int32")
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._shared is not None and self._inner.is_error():
            self._shared.worn = True
            self._inner, self._shared, self.lexer = self._shared.fresh(), None, id(self)
            for token in self._taken:
                self._inner.consume_token(token)
            self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._inner.is_error():
            raise GrammarError(_short(self._inner.get_error()))

    def accept(self, token: int) -> bool:
        """A token that the grammar does not allow is reported by the next `fill`."""
        self._taken.append(token)
        self._inner.consume_token(token)
        return bool(self._inner.is_stopped() and not self._inner.is_error())

    def forced(self) -> list[int]:
        return list(self._inner.compute_ff_tokens())


def _source(spec: GrammarSpec, specials: dict[str, int]) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    check_multiples(spec.source + spec.frame)
    if spec.kind == "json_object":
        return str(LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_FORM))
    if spec.kind == "json_schema":
        return str(LLMatcher.grammar_from_json_schema(spec.source, overrides=JSON_FORM))
    if spec.kind == "regex":
        return str(LLMatcher.grammar_from_regex(spec.source))
    if spec.kind == "lark":
        return spec.source
    if spec.kind == "ebnf":
        source = any_to_lark(spec.source)
        check_complement(source)
        return str(LLMatcher.grammar_from_lark(source))
    if spec.kind == "structural_tag":
        return str(LLMatcher.grammar_from_lark(lark(spec.source, specials, JSON_FORM)))
    choices = json.loads(spec.source)
    if not choices or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("a list of strings, at least one and none empty, is expected")
    choice = " | ".join(json.dumps(c) for c in dict.fromkeys(choices))
    return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choice}"))  # of rules it takes no 2,000


def _framed(source: str, frame: str) -> str:
    """The library's JSON of two grammars: the frame, and what it calls @body."""
    if not frame:
        return source
    body = json.loads(source)["grammars"][0] if source.startswith('{"grammars"') else {"lark_grammar": source}
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": frame}, body | {"name": "body"}]})


def _short(reason: str) -> str:
    """The library's words without the state it appends."""
    words = " ".join(reason.split("<non-verbose/>")[0].split())[:300]
    if words == "NoExtensionBias":  # of a rule that is nothing but itself
        return "nothing can match it"
    return words or "the grammar library gave no reason"
