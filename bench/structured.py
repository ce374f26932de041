"""What structured outputs cost and gain: JSON with and without jump-forward, and what free rows pay for masks.

Usage: python bench/structured.py jump [--device cpu] [--dtype auto] [--rounds 3]
       python bench/structured.py free [--step-ms 10 5] [--rounds 3]
`jump` runs the demo model, both ways in turn in one process, and compares the texts. `free` has 64 rows of SmolLM2's
vocabulary on a device that sleeps for a step; the figure is the time between tokens of the rows without a grammar.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.null import NullBackend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.offline import Engine
from polyradix.grammar.spec import GrammarSpec
from polyradix.schedule.params import SamplingParams


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


FIXED = closed(
    {
        "sentiment": {"enum": ["positive", "negative", "neutral"]},
        "is_complaint": {"type": "boolean"},
        "urgency_level": {"type": "integer", "minimum": 1, "maximum": 5},
        "product_category": {"enum": ["electronics", "clothing", "groceries", "furniture"]},
        "requires_human_followup": {"type": "boolean"},
        "refund_requested": {"type": "boolean"},
    }
)
MIXED = closed(
    {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "address": closed({"street": {"type": "string", "maxLength": 40}, "city": {"type": "string", "maxLength": 40}}),
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
    }
)


class Sleeper(NullBackend):
    """`null` with masks: a row's sample is the first token that its mask allows from a hashed place on. What choosing
    them takes is no part of a device's work, so the next step sleeps for as much less."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds, True)
        self._seconds = seconds
        self.caps = type(self.caps)(**{**vars(self.caps), "features": self.caps.features | {"mask"}})

    def sample(self, logits: Any, batch: SampleBatch) -> Any:
        return self._launch.run(lambda _: self._tokens(batch), logits)

    def _tokens(self, batch: SampleBatch) -> Any:
        begin = time.perf_counter()
        tokens = self._chosen(batch)
        self._step_time_s = max(0.0, self._seconds - (time.perf_counter() - begin))
        return tokens

    def _chosen(self, batch: SampleBatch) -> Any:
        tokens = super()._tokens(batch)
        if batch.mask is None:
            return tokens
        words = np.roll(batch.mask, -1, axis=1) if tokens[0] % 2 else batch.mask
        word = (words != 0).argmax(axis=1)
        value = words[np.arange(len(tokens)), word].view(np.uint32)
        bit = np.log2(value & (~value + 1)).astype(np.int32)
        word = (word + (tokens[0] % 2)) % words.shape[1]
        return np.where((batch.mask == -1).all(axis=1), tokens, word * 32 + bit).astype(np.int32)


def jump(device: str, dtype: Any, rounds: int) -> None:
    for name, schema in (("fixed keys", FIXED), ("strings and lists too", MIXED)):
        for batch in (1, 16):
            options: dict[str, Any] = {"device": device, "dtype": dtype, "progress": False}
            engines = {way: Engine("demo", jump_forward=way, **options) for way in (False, True)}
            shapes = {way: count_chunks(engine.core) for way, engine in engines.items()}
            seconds: dict[bool, list[float]] = {False: [], True: []}
            busy: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(rounds + 1):
                texts = [f"Review {turn}-{i}: the lamp broke after two days. As JSON: " for i in range(batch)]
                prompts = [whole_pages(engines[True], text) for text in texts]
                outputs = []
                for way, engine in engines.items():
                    engine.generate(prompts, max_tokens=1)  # into the prefix cache: decoding is what is timed
                    shapes[way].clear()
                    begin, used = time.perf_counter(), time.process_time()
                    done = engine.generate(
                        prompts, grammar={"kind": "json_schema", "source": json.dumps(schema)}, temperature=0.0,
                        max_tokens=200,
                    )  # fmt: skip
                    if turn:
                        seconds[way].append(time.perf_counter() - begin)
                        busy[way].append(time.process_time() - used)
                    if errors := [c.error for c in done if c.error]:
                        raise RuntimeError(errors[0])
                    outputs.append([c.text for c in done])
                equal = sum(a == b for a, b in zip(*outputs, strict=True))
            plain, fast, cpu_plain, cpu_fast = (float(np.median(t[w])) for t in (seconds, busy) for w in (False, True))
            print(
                f"{name}, batch {batch}: {plain:.3f} s, with jump-forward {fast:.3f} s: {plain / fast:.2f} times; "
                f"processor time {cpu_plain:.3f} and {cpu_fast:.3f} s, {cpu_plain / cpu_fast:.2f} times; "
                + "steps "
                + " and ".join(f"{len(s)} ({sum(s)} with chunks)" for s in shapes.values())
                + f"; {equal} of {batch} texts equal; {len(done[0].tokens)} tokens, as {done[0].text[:60]}",
                flush=True,
            )


def whole_pages(engine: Engine, text: str) -> list[int]:
    """Its tokens, filled up in front: all but the last are whole pages, and so can come from the prefix cache."""
    tokens = engine.tokenizer.encode(text)
    return tokens[:1] * (1 + -len(tokens) % engine.core.page_size) + tokens


def count_chunks(core: EngineCore) -> list[bool]:
    """Of every step from now on, whether a row has more than one token."""
    steps: list[bool] = []
    prepare = core.backend.prepare

    def counted(batch: HostBatch, prev: Any = None) -> Any:
        steps.append(batch.num_tokens > batch.num_seqs)
        return prepare(batch, prev)

    core.backend.prepare = counted  # type: ignore[method-assign]
    return steps


def free_row_ms(step_seconds: float, free: int, grammars: int, jump_forward: bool, seconds: float = 6.0) -> float:
    config = EngineConfig(model="demo", max_seqs=64, kv_pages=40_000, page_size=16,
                          jump_forward=jump_forward, progress=False)  # fmt: skip
    core = EngineCore(config, Sleeper(step_seconds))
    spec = GrammarSpec(kind="json_schema", source=json.dumps(MIXED))
    prompt = np.arange(5, 37, dtype=np.int32)
    for i in range(free):
        core.submit(f"f{i}", prompt, SamplingParams(max_tokens=8000, seed=i, ignore_eos=True))
    running: set[str] = set()
    count = tokens = 0
    begin = 0.0
    while not begin or time.perf_counter() - begin < seconds:
        while len(running) < grammars:
            running.add(rid := f"g{count}")
            core.submit(rid, prompt, SamplingParams(max_tokens=400, seed=count, grammar=spec))
            count += 1
        for chunk in core.step():
            if chunk.finish == "error":
                raise RuntimeError(chunk.error)
            running.discard(chunk.rid) if chunk.finish else None
            tokens += len(chunk.tokens) if chunk.rid.startswith("f") and begin else 0
        if not begin and core.scheduler.running == free + grammars:
            begin = time.perf_counter()
    return (time.perf_counter() - begin) * 1e3 * free / tokens


def free(steps_ms: list[float], rounds: int) -> None:
    for ms in steps_ms:
        for alone, grammars in ((40, 8), (64, 32)):
            cases = ((alone, 0, True), (alone - grammars, grammars, False), (alone - grammars, grammars, True))
            times = [[free_row_ms(ms / 1e3, *case) for case in cases] for _ in range(rounds)]
            base, plain, jumping = np.median(times, axis=0)
            print(
                f"step {ms} ms: {alone} free {base:.2f} ms a token; {alone - grammars} and {grammars} with a schema "
                f"{plain:.2f} ({plain / base - 1:+.0%}), with jump-forward {jumping:.2f} ({jumping / base - 1:+.0%})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("jump", "free"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[10, 5])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jump(args.device, args.dtype, args.rounds) if args.what == "jump" else free(args.step_ms, args.rounds)


if __name__ == "__main__":
    main()
