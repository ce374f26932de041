"""Structured outputs of the demo model on this backend, judged by jsonschema and re, beside free rows."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from polyradix.engine.offline import Engine
from polyradix.grammar.spec import GrammarSpec
from polyradix.schedule.params import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["rivers", "music", "bread"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
PATTERN = r"[A-Z][a-z]{2,8} \d{4}-\d{2}"
FREE = SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True)


def _engine(jump_forward: bool) -> Engine:
    return Engine(
        "demo", device="cpu", max_context=256, kv_pages=100, max_seqs=8, progress=False, jump_forward=jump_forward
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    return _engine(True)


def _run(engine: Engine, jobs: dict[str, SamplingParams]) -> dict[str, list[int]]:
    engine.core.flush_cache()
    out: dict[str, list[int]] = {rid: [] for rid in jobs}
    for rid, params in jobs.items():
        prompt = engine.tokenizer.encode(f"As JSON, person {rid} with name, age and likes: ")
        engine.core.submit(rid, np.array(prompt, np.int32), params)
    while engine.core.has_work:
        for chunk in engine.core.step():
            assert chunk.finish != "error", chunk.error
            out[chunk.rid] += chunk.tokens if chunk.stop_token is None else chunk.tokens[:-1]
    return out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_validate_and_free_rows_keep_their_tokens(engine: Engine, temperature: float) -> None:
    def asks(kind: Any, source: str) -> SamplingParams:
        stops = tuple(engine.tokenizer.eos_ids)
        spec = GrammarSpec(kind=kind, source=source)
        return SamplingParams(max_tokens=80, temperature=temperature, seed=1, stop_token_ids=stops, grammar=spec)

    free = {"free0": FREE, "free1": FREE}
    alone = _run(engine, free)
    grammars = {"json": asks("json_schema", json.dumps(SCHEMA)), "regex": asks("regex", PATTERN)}
    together = _run(engine, free | grammars)
    assert {rid: together[rid] for rid in free} == alone
    jsonschema.validate(json.loads(engine.tokenizer.decode(together["json"])), SCHEMA)
    assert re.fullmatch(PATTERN, engine.tokenizer.decode(together["regex"]))


def test_jump_forward_takes_fewer_steps_to_the_same_text(engine: Engine) -> None:
    """On the weights of a real model; core's tests have random ones."""
    spec = GrammarSpec(kind="json_schema", source=json.dumps(SCHEMA))
    jobs = {f"json{i}": SamplingParams(max_tokens=80, temperature=0.0, grammar=spec) for i in range(3)}
    plain, steps, jumped = _engine(False), engine.core.stats().steps, engine.core.stats().jumped_tokens
    assert _run(engine, jobs) == _run(plain, jobs)
    assert engine.core.stats().jumped_tokens > jumped + 20
    assert engine.core.stats().steps - steps < plain.core.stats().steps
