"""Grammar libraries compared on JSON schema coverage, compile time and mask time.

Usage: python bench/grammar.py SUITE_DIR [--engine llguidance|xgrammar]
SUITE_DIR is json/tests/draft2020-12 of the JSON-Schema-Test-Suite; the sdist of `jsonschema` has it.
Coverage: each schema compiles or is refused; each instance, written compactly, is accepted or not. A process does the
work, and is ended when a schema takes longer than LIMIT seconds. xgrammar is no dependency: install it to compare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from polyradix.engine.tokenizer import Tokenizer, load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint

LIMIT = 5.0
FIXED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
    },
    "required": ["name", "age", "address", "tags"],
    "additionalProperties": False,
}
PERSON = {
    "name": "Ada Lovelace of London",
    "age": 36,
    "address": {"street": "12 St James's Square", "city": "London"},
    "tags": ["red", "blue"],
}
Vocab = tuple[list[bytes], int, Tokenizer]


class Llguidance:
    def __init__(self, vocab: Vocab) -> None:
        import llguidance

        tokens, eos, tokenizer = vocab

        class Mine:
            eos_token_id, bos_token_id, special_token_ids = eos, None, [eos]

            def __init__(self) -> None:
                self.tokens = tokens

            def __call__(self, text: str) -> list[int]:
                return tokenizer.encode(text, add_special=False)

        self.lib = llguidance
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Mine()))
        self.limits = llguidance.LLParserLimits()

    def compile(self, schema: Any) -> Any:
        m = self.lib.LLMatcher(
            self.tokenizer, self.lib.LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0
        )
        if m.is_error():
            raise ValueError(m.get_error())
        return m

    def accepts(self, compiled: Any, text: str) -> bool:
        m = compiled.deep_copy()
        tokens = self.tokenizer.tokenize_str(text)
        return bool(m.try_consume_tokens(tokens) == len(tokens) and m.is_accepting())

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any, row: np.ndarray) -> None:
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def forced(self, matcher: Any) -> int:
        return len(matcher.compute_ff_tokens())


class Xgrammar:
    def __init__(self, vocab: Vocab) -> None:
        import xgrammar

        tokens, eos, _ = vocab
        self.lib = xgrammar
        info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[eos])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def compile(self, schema: Any) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def accepts(self, compiled: Any, text: str) -> bool:
        m = self.lib.GrammarMatcher(compiled)
        return bool(m.accept_string(text.encode()) and m.is_completed())

    def matcher(self, compiled: Any) -> Any:
        return self.lib.GrammarMatcher(compiled)

    def fill(self, matcher: Any, row: np.ndarray) -> None:
        matcher.fill_next_token_bitmask(row.reshape(1, -1), 0)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def forced(self, matcher: Any) -> int:
        return len(matcher.find_jump_forward_string())


ENGINES: dict[str, Any] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


def demo_vocab() -> Vocab:
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    eos = min(tokenizer.eos_ids)
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], eos, tokenizer


def large_vocab(size: int = 131_072) -> Vocab:
    """The demo's, and pairs of its tokens: many long tokens with shared prefixes, as in large models."""
    tokens, eos, tokenizer = demo_vocab()
    rng, seen = np.random.default_rng(0), set(tokens)
    while len(tokens) < size:
        a, b = rng.integers(300, 20_000, 2)
        pair = tokens[a] + tokens[b]
        if pair not in seen:
            seen.add(pair)
            tokens.append(pair)
    return tokens, eos, tokenizer


def compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def serve(pipe: Connection, name: str) -> None:
    engine = ENGINES[name](demo_vocab())
    pipe.send("ready")
    while True:
        schema, tests = pipe.recv()
        begin = time.perf_counter()
        try:
            compiled = engine.compile(schema)
        except Exception as error:
            pipe.send(("refused", time.perf_counter() - begin, str(error)[:200]))
            continue
        took = time.perf_counter() - begin
        pipe.send(
            (
                "compiled",
                took,
                [(engine.accepts(compiled, json.dumps(t["data"], separators=(",", ":"))), t["valid"]) for t in tests],
            )
        )


def start(name: str) -> tuple[Any, Connection]:
    here, there = mp.Pipe()
    process = mp.Process(target=serve, args=(there, name), daemon=True)
    process.start()
    there.close()
    here.recv()
    return process, here


def coverage(name: str, suite: Path) -> None:
    count: Counter[str] = Counter()
    times, loose = [], Counter[str]()
    process, pipe = start(name)
    for path in sorted(suite.glob("*.json")):
        for case in json.loads(path.read_text()):
            count["schemas"] += 1
            count["instances"] += len(case["tests"])
            pipe.send((case["schema"], case["tests"]))
            try:
                answer = pipe.recv() if pipe.poll(LIMIT) else ("hung", LIMIT, None)
            except EOFError:
                answer = ("died", 0.0, None)
            if answer[0] in ("hung", "died"):
                print("  ", answer[0], path.stem, case["description"])
                process.kill()
                process, pipe = start(name)
            count[answer[0]] += 1
            times.append(answer[1])
            if answer[0] == "compiled":
                wrong = [(got, want) for got, want in answer[2] if got != want]
                count["right"] += not wrong
                count["instances right"] += len(answer[2]) - len(wrong)
                count["accepts invalid"] += any(got for got, _ in wrong)
                count["refuses valid"] += any(not got for got, _ in wrong)
                count["instances: invalid accepted"] += sum(got for got, _ in wrong)
                count["instances: valid refused"] += sum(not got for got, _ in wrong)
                loose[path.stem] += any(got for got, _ in wrong)
    process.kill()
    print(name, dict(count))
    print("  invalid accepted, by file:", {k: v for k, v in loose.most_common() if v})
    ms = np.array(times) * 1e3
    print(f"  compile ms: median {np.median(ms):.2f}, p99 {np.quantile(ms, 0.99):.1f}, most {ms.max():.0f}")


def masks(name: str, label: str, vocab: Vocab) -> None:
    begin = time.perf_counter()
    engine = ENGINES[name](vocab)
    print(f"{name}, {label}: {len(vocab[0])} tokens, tokenizer made in {(time.perf_counter() - begin) * 1e3:.0f} ms")
    suite_text = compact(PERSON)
    cases = {"fixed keys": (FIXED, suite_text), "any object": ({"type": "object"}, suite_text)}
    cases["nullable list of people"] = (
        {"type": "array", "items": {"anyOf": [FIXED, {"type": "null"}]}, "maxItems": 8},
        compact([PERSON, None, PERSON, PERSON]),
    )
    cases["pattern and format"] = (
        {
            "type": "object",
            "properties": {"id": {"pattern": "^[A-Z]{3}-[0-9]{4}$"}, "at": {"type": "string", "format": "date-time"}},
            "required": ["id", "at"],
        },
        compact({"id": "ABC-1234", "at": "2026-11-24T14:08:00Z"}),
    )
    row = np.zeros(-(-len(vocab[0]) // 32), np.int32)
    for case, (schema, text) in cases.items():
        begin = time.perf_counter()
        try:
            compiled = engine.compile(schema)
        except Exception as error:
            print(f"  {case}: refused: {str(error)[:150]}")
            continue
        compiling = time.perf_counter() - begin
        ids = vocab[2].encode(text, add_special=False)
        for turn in ("first", "again"):
            matcher, fill, take, forced = engine.matcher(compiled), [], [], 0
            for token in ids:
                a = time.thread_time()
                engine.fill(matcher, row)
                b = time.thread_time()
                forced += engine.forced(matcher) > 0
                c = time.thread_time()
                if not engine.accept(matcher, token):
                    print(f"  {case}: does not accept {text[:60]}")
                    break
                fill.append((b - a) * 1e6)
                take.append((time.thread_time() - c) * 1e6)
            print(
                f"  {case} ({turn}): compile {compiling * 1e3:.1f} ms; mask us mean {np.mean(fill):.0f}, median "
                f"{np.median(fill):.0f}, p99 {np.quantile(fill, 0.99):.0f}, most {max(fill):.0f}; accept us mean "
                f"{np.mean(take):.0f}; something forced at {forced} of {len(ids)} tokens"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), default="llguidance")
    args = parser.parse_args()
    coverage(args.engine, args.suite)
    masks(args.engine, "SmolLM2", demo_vocab())
    masks(args.engine, "synthetic", large_vocab())


if __name__ == "__main__":
    main()
