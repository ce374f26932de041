"""L3: whole models of every family against the logits that transformers gives for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyradix.backend.expand import Expanded
from polyradix.backend.protocol import Limits, Step
from polyradix.graph.checkpoint import load_params
from polyradix.graph.dense import make_step
from polyradix_conformance.cases import case
from polyradix_conformance.cases.sampling import greedy_batch
from polyradix_conformance.flow import poison
from polyradix_conformance.golden import REBOUND, Golden, Rows, families, load
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.oracle import Arr
from polyradix_conformance.rig import Mismatch, Rig, same
from polyradix_conformance.tolerance import K

LIMITS = Limits(max_tokens=256, max_seqs=8, max_context=128)
Body = Callable[[Rig, Golden], None]


class Model:
    """A golden model on a backend, with its sequences in a cache of shuffled and poisoned pages."""

    def __init__(self, rig: Rig, golden: Golden, wrap: Callable[[Any], Any] = lambda ops: ops) -> None:
        self.rig, self.golden, self.wrap = rig, golden, wrap
        self.ragged = Ragged(tuple(map(len, golden.sequences)), rig.page)
        self.tokens = np.concatenate(golden.sequences)
        self.params = self.packed(seed=0)
        self.kv = self.cache()
        self.recompile()

    def packed(self, seed: int) -> Any:
        g = self.golden
        return load_params(
            g.checkpoint(seed), g.spec, self.rig.dtype, self.rig.backend, max_context=LIMITS.max_context, progress=False
        )

    def cache(self) -> Any:
        spec, pages = self.golden.spec.kv_spec(self.rig.page, self.rig.dtype), self.ragged.num_pages
        kv = self.rig.backend.alloc_kv(spec, pages)
        return self.rig.backend.import_pages(kv, range(pages), poison(spec, pages))

    def recompile(self) -> None:
        step: Step = make_step(self.golden.spec)
        self.run = self.rig.backend.compile(lambda ops, *rest: step(self.wrap(ops), *rest), LIMITS)

    def step(self, parts: list[Part]) -> tuple[Arr, Arr]:
        """Logits [S,V] after each part, and the greedy tokens [S]."""
        batch = self.ragged.batch(parts)
        batch.tokens[:] = self.tokens[batch.tokens]
        backend = self.rig.backend
        logits, self.kv = self.run(self.params, self.kv, backend.prepare(batch))
        tokens = backend.sample(logits, greedy_batch(len(parts)))
        shape = (len(parts), self.golden.spec.vocab)
        return self.rig.fetch(logits, shape), self.rig.fetch(tokens, shape[:1])

    def check(self, what: str, parts: list[Part], truth: Rows | None = None) -> Arr:
        """One batch against the truth: the logits, and the greedy tokens."""
        truth = truth or self.golden.ends(parts)
        logits, tokens = self.step(parts)
        self.rig.close(what, logits, truth.logits, truth.floors[self.rig.dtype])
        best(what, tokens.astype(int), truth, self.rig.dtype)
        return logits


def best(what: str, tokens: Arr, truth: Rows, dtype: str) -> None:
    """Every token [R] is the best one, or one that is the best if every logit is wrong by K floors."""
    behind = truth.logits.max(axis=1) - np.take_along_axis(truth.logits, tokens[:, None], axis=1)[:, 0]
    for row in np.flatnonzero(behind > 2 * K * truth.floors[dtype])[:1]:
        want = truth.logits[row].argmax()
        raise Mismatch(f"{what}: greedy token {row} is {tokens[row]}; expected {want}, {behind[row]:.3g} above it")


def prefill(g: Golden) -> list[Part]:
    return [Part(s, 0, n) for s, n in enumerate(g.prompts)]


def decodes(g: Golden) -> list[list[Part]]:
    """One batch a step, of every sequence that has a token left."""
    left = [(s, n, len(g.sequences[s])) for s, n in enumerate(g.prompts)]
    most = max(stop - n for _, n, stop in left)
    return [[Part(s, n + i, n + i + 1) for s, n, stop in left if n + i < stop] for i in range(most)]


def whole(rig: Rig, g: Golden) -> None:
    """Prompts in one batch, and then, in a new cache, prompts and outputs in one batch."""
    model = Model(rig, g)
    model.check("prompts", prefill(g))
    model.kv = model.cache()
    model.check("prompts and outputs", model.ragged.whole()[0])


def chunked(rig: Rig, g: Golden) -> None:
    model = Model(rig, g)
    for i, parts in enumerate(model.ragged.chunked()):
        model.check(f"chunk {i}", parts)


def decode(rig: Rig, g: Golden) -> None:
    model = Model(rig, g)
    for i, parts in enumerate([prefill(g), *decodes(g)]):
        model.check(f"decode step {i}", parts)


def mixed(rig: Rig, g: Golden) -> None:
    model = Model(rig, g)
    for i, parts in enumerate(model.ragged.mixed()):
        model.check(f"mixed batch {i}", parts)


def compiled(rig: Rig, g: Golden) -> None:
    """A step compiled once, on batches that grow and shrink, gives what a step compiled for each of them gives."""
    once, fresh = Model(rig, g), Model(rig, g)
    long, *short = sorted(prefill(g), key=lambda p: -p.stop)
    steps = decodes(g)
    for i, parts in enumerate([short[:1], [long], steps[0][-2:], short[1:], steps[0][:-2], steps[1], steps[2][:1]]):
        fresh.recompile()
        got, want = (
            m.check(f"{name}, batch {i}", parts) for m, name in ((once, "one compile"), (fresh, "a fresh one"))
        )
        if rig.backend.caps.batch_invariant:
            same(f"batch {i}, one compile against a fresh one", got, want)


def rebound(rig: Rig, g: Golden) -> None:
    """One compiled step follows the parameters it is called with, there and back."""
    model = Model(rig, g)
    part, kept = prefill(g)[REBOUND], model.params
    for what, params, truth in (
        ("first weights", kept, None),
        ("other weights", model.packed(seed=1), g.rebound),
        ("first weights again", kept, None),
    ):
        model.params, model.kv = params, model.cache()
        model.check(what, [part], truth)


def expanded(rig: Rig, g: Golden) -> None:
    """Every fused verb as its expansion over the same backend's basic ones."""
    model = Model(rig, g, wrap=Expanded)
    for parts in (prefill(g), *decodes(g)[:2]):
        model.check("expanded", parts)


BODIES: tuple[Body, ...] = (whole, chunked, decode, mixed, compiled, rebound, expanded)


def profile_of(golden: Golden) -> str:
    if golden.config.get("quantization_config"):
        return "quant"
    spec = golden.spec
    if spec.latent:
        return "sparse" if spec.latent.index else "mla"
    return "moe" if spec.experts else "dense"


def _on(body: Body, family: str) -> Callable[[Rig], None]:
    return lambda rig: body(rig, load(family))


for dtype in ("float32", "bfloat16"):
    for family in families():
        golden = load(family)
        if dtype not in golden.dtypes:
            continue
        needs = golden.spec.needs(dtype)
        features, profile = tuple(sorted(needs.features)), profile_of(golden)
        for body in BODIES:
            name = f"L3/{family}/{body.__name__}"
            case(name, dtype, _on(body, family), needs.head_dim, features, profile=profile)
