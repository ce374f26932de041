"""The demo model's greedy tokens against transformers' in float32 (smollm.json, which smollm.py makes)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams

ANSWERS = json.loads((Path(__file__).parent / "smollm.json").read_text())
BOUNDS = {"float32": 0.01, "bfloat16": 0.25}  # of logits around 20; a choice closer than this may go either way


@pytest.mark.parametrize("capture", [1, 0])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_greedy_tokens(dtype: Any, capture: int) -> None:
    options: dict[str, Any] = {"device": "cuda", "backend_options": {"capture": capture}}
    follow_all(EngineCore(EngineConfig(model="demo", dtype=dtype, max_context=512, **options)), BOUNDS[dtype])


def follow_all(core: EngineCore, bound: float) -> int:
    """All answers at once, each set right and taken up again where it left the reference at a close choice; how many
    tokens left it. One that leaves it elsewhere is an error."""
    at, left = [0] * len(ANSWERS), 0
    while todo := [i for i, a in enumerate(ANSWERS) if at[i] < len(a["tokens"])]:
        for i, got in zip(todo, greedy(core, [(ANSWERS[i], at[i]) for i in todo]), strict=True):
            want, gaps = (ANSWERS[i][name][at[i] :] for name in ("tokens", "gaps"))
            same = next((n for n, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), len(want))
            assert same == len(want) or gaps[same] <= bound, f"answer {i}, token {at[i] + same}: {got[same]}"
            left += same < len(want)
            at[i] += same + 1
    assert left < sum(len(a["tokens"]) for a in ANSWERS) // 8, "hardly an answer is the reference's"
    return left


def greedy(core: EngineCore, asked: list[tuple[dict[str, list[int]], int]]) -> list[list[int]]:
    out: dict[str, list[int]] = {}
    for answer, at in asked:
        rid, n = f"r{len(out)}", len(answer["tokens"]) - at
        out[rid] = []
        prompt = np.array(answer["prompt"] + answer["tokens"][:at], np.int32)
        core.submit(rid, prompt, SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            out[chunk.rid] += chunk.tokens
    return list(out.values())
