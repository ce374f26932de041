"""Model families by backends, as one Markdown page: every cell counted from the reports' cases on golden models."""

from __future__ import annotations

from collections.abc import Iterable

from polyradix.graph.cost import Batch, trace
from polyradix.graph.dense import param_specs
from polyradix_conformance.golden import families, load
from polyradix_conformance.matrix.markdown import line, text
from polyradix_conformance.matrix.model import STATES, Column, Json, Matrix, counts, day, state_of

MODELS = {  # what each golden model is a small one of
    "deepseek-dense": "none known: DeepSeek-V3 without experts, with biases and half-split rope",
    "deepseek-v2": "DeepSeek-V2, V2.5, Coder-V2",
    "deepseek-v2-lite": "DeepSeek-V2-Lite, Coder-V2-Lite",
    "deepseek-v3": "DeepSeek-V3, V3.1, R1",
    "deepseek-v3.2": "DeepSeek-V3.2, V3.2-Exp, in contexts beyond index_topk",
    "deepseek-v3.2-all-seen": "the same in shorter ones",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gpt-oss": "gpt-oss-20b, gpt-oss-120b",
    "llama": "Llama 3.1, 3.3",
    "llama-bias": "none known: Llama with biases and linear rope",
    "llama-fp8": "Llama in FP8 blocks, as DeepSeek publishes its models",
    "mistral": "Mistral 7B",
    "mistral-large-3": "Mistral Large 3",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3-windows": "none known: Qwen3 with windows in some layers",
    "smollm": "SmolLM, SmolLM2, Llama 3.2: tied embeddings",
}
ABOUT = """# Models

What runs where, by reports alone: `conform families ci/reports/*.json -o docs/models.md` wrote this page, and a test
compares both. A row is a tiny model with every branch of its architecture, whose logits transformers' own class gave in
float32. A cell is how many of its cases passed, of all: prefill, chunks, decode, mixed batches, one compiled step, new
weights, fused verbs as their expansions, batch against batch."""


def page(m: Matrix) -> str:
    """The page of these reports."""
    names = sorted({name for c in m.columns for case in c.cases if (name := family(case["id"]))})
    verbs = {name: _verbs(name) for name in families()}
    common = frozenset.intersection(*verbs.values())
    head = ["family", "stands for", "verbs", "features", *(_title(c, m.columns) for c in m.columns)]
    rows = [
        [name, MODELS.get(name, ""), _listed(verbs.get(name, common) - common), _listed(_features(name))]
        + [_cell(c, name) for c in m.columns]
        for name in names
    ]
    legend = "; ".join(f"{symbol} {words}" for symbol, words in STATES.values())
    every = f"Every family needs {_listed(common)}; the table has what it needs beside them. {legend}."
    table = [line(head), "|---" * len(head) + "|", *(line([text(x) for x in row]) for row in rows)]
    sources = [f"- {_source(c, m.columns, r)}" for c in m.columns for r in c.reports]
    return "\n\n".join((ABOUT, every, "\n".join(table), "Reports:\n\n" + "\n".join(sources))) + "\n"


def family(case: str) -> str | None:
    """The golden model that a case id is about."""
    layer, *rest = case.split("/")[:-1]
    if layer == "L3":
        return rest[0]
    return rest[-1] if layer == "L4" and "batches" in rest and rest[-1] in families() else None


def _cell(c: Column, name: str) -> str:
    cases = [case for case in c.cases if family(case["id"]) == name]
    symbol, passed = STATES[state_of(cases)][0], sum(case["status"] == "pass" for case in cases)
    return f"{symbol} {passed}/{len(cases)}" if passed else symbol


def _title(c: Column, columns: Iterable[Column]) -> str:
    """The backend, and the options that tell it from its other columns."""
    r = c.last
    others = [x.last["options"] for x in columns if x.last["backend"] == r["backend"]]
    telling = {k: v for k, v in r["options"].items() if any(o.get(k) != v for o in others)}
    options = " ".join(f"{k}={v}" for k, v in sorted(telling.items()))
    return " ".join([text(r["backend"]), *["**emulated**"] * r["emulated"], *[text(options)] * bool(options)])


def _source(c: Column, columns: Iterable[Column], r: Json) -> str:
    return f"{_title(c, columns)} on {text(r['device'])}, {day(r)}, {r['profile']}: {counts(r)}"


def _verbs(name: str) -> frozenset[str]:
    spec = load(name).spec
    return trace(spec, param_specs(spec, "float32"), spec.kv_spec(16, "float32"), Batch(1, 1, 1)).verbs


def _features(name: str) -> frozenset[str]:
    return load(name).spec.needs("float32").features if name in families() else frozenset()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
