"""The list of what is timed, at two sizes. `small` is for tests and for slow backends; its figures mean nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from polyradix.backend.protocol import Heads
from polyradix.graph.dense import param_specs
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ModelSpec
from polyradix_conformance.oracle import SampleRow
from polyradix_conformance.perf import cost, host, model, subjects
from polyradix_conformance.perf.cost import Cost
from polyradix_conformance.perf.program import Shape, Subject, rows_shape
from polyradix_conformance.perf.subjects import Scale, size_of
from polyradix_conformance.rig import Rig

MIB = 2**20


@dataclass(frozen=True)
class PerfCase:
    """`cost` is of one call. `streams`: what it reads overflows caches, so it shows what memory does. `probe`: the
    ceiling is taken from it."""

    id: str
    cost: Cost
    build: Callable[[Rig], Subject]
    head_dim: int = 64
    streams: bool = False
    probe: Literal["read", "compute"] | None = None


def llama(layers: int, hidden: int, intermediate: int, heads: Heads, vocab: int) -> ModelSpec:
    return ModelSpec("LlamaForCausalLM", layers, hidden, intermediate, heads, vocab, 131072, 1e-5, Rope(1e5))


@dataclass(frozen=True)
class Size:
    """`linears` are K, N; `widths` of norms; `inner` of gated, before halving; `models` by name."""

    scale: Scale
    decode: tuple[tuple[int, int], ...]  # sequences, context
    prefill: tuple[Shape, ...]
    heads: tuple[Heads, ...]
    linears: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    inner: tuple[int, ...]
    verb_rows: tuple[int, ...]
    head: tuple[int, int]  # hidden, vocabulary
    seqs: tuple[int, ...]
    models: dict[str, ModelSpec]
    steps: tuple[tuple[int, int], ...]


LLAMA_8B, SMOLLM = Heads(32, 8, 128), Heads(9, 3, 64)

SIZES = {
    "serving": Size(
        Scale(96 * MIB, 32),
        tuple((s, c) for s in (1, 16, 64) for c in (128, 1024, 4096)),
        (Shape(1, 1024, 1024), Shape(16, 32, 1024)),
        (LLAMA_8B, SMOLLM),
        ((576, 1536), (4096, 4096)),
        (1, 16, 64, 512),
        (576, 4096),
        (1536, 14336),
        (16, 512),
        (576, 49152),
        (1, 16),
        {  # the second with few layers and a small vocabulary, to fit small machines
            "smollm2-135m": llama(30, 576, 1536, SMOLLM, 49152),
            "llama-3.1-8b-2-layers": llama(2, 4096, 14336, LLAMA_8B, 16384),
        },
        ((1, 256), (16, 1024)),
    ),
    "small": Size(
        Scale(64 * 1024, 4),
        ((1, 16), (4, 37)),
        (Shape(1, 40, 40), Shape(16, 2, 20)),
        (Heads(4, 2, 64), Heads(3, 1, 64)),
        ((64, 96), (128, 128)),
        (1, 4, 80),
        (64,),
        (96,),
        (16, 80),
        (64, 1000),
        (1, 4),
        {"tiny": llama(2, 64, 96, Heads(4, 2, 64), 500)},
        ((1, 20), (4, 37)),
    ),
}

SAMPLING = {
    "greedy": SampleRow(0.0, 0, 1.0, 0.0, 0, 0),
    "top-p": SampleRow(0.8, 0, 0.95, 0.0, 0, 0),
    "full": SampleRow(0.8, 50, 0.95, 0.02, 0, 0),
}


def cases(name: str, dtype: str) -> list[PerfCase]:
    """All cases of a size in `dtype`; ids end with it, and hold the verb's name as a part."""
    size, n = SIZES[name], size_of(dtype)
    parts = (_linears, _logits, _pages, _attention, _rows, _sampling, _steps)
    out = [c for part in parts for c in part(size, n)]
    return [PerfCase(f"P/{c.id}/{dtype}", c.cost, c.build, c.head_dim, c.streams, c.probe) for c in out]


def _linears(size: Size, n: int) -> Iterator[PerfCase]:
    probes: dict[int, Literal["read", "compute"]] = {size.rows[0]: "read", size.rows[-1]: "compute"}
    for shape in size.linears:
        for rows in size.rows:
            k, out = shape
            yield PerfCase(
                f"linear/{k}x{out}/rows-{rows}",
                cost.linear(rows, k, out, n),
                partial(subjects.linear, scale=size.scale, rows=rows, k=k, n=out),
                streams=size.scale.streams(2 * k * out * n),
                probe=probes.get(rows) if shape == size.linears[-1] else None,
            )


def _logits(size: Size, n: int) -> Iterator[PerfCase]:
    hidden, vocab = size.head
    for seqs in size.seqs:
        yield PerfCase(
            f"logits/{vocab}x{hidden}/rows-{seqs}",
            cost.linear(seqs, hidden, vocab, n, 4),
            partial(host.logits, scale=size.scale, seqs=seqs, hidden=hidden, vocab=vocab),
            streams=size.scale.streams(hidden * vocab * n),
            probe="read" if seqs == size.seqs[0] else None,
        )


def _pages(size: Size, n: int) -> Iterator[PerfCase]:
    heads = size.heads[0]
    tokens = host.page_tokens(size.scale, heads, n)
    for verb, factor in (("copy_pages", 2), ("export_pages", 1)):
        yield PerfCase(
            f"{verb}/{heads.kv}x{heads.dim}",
            Cost(factor * tokens * host.token_bytes(heads, n), 0),
            partial(host.pages, tokens=tokens, heads=heads, verb=verb),
            heads.dim,
            streams=True,
            probe="read" if verb == "copy_pages" else None,
        )


def _attention(size: Size, n: int) -> Iterator[PerfCase]:
    for heads in size.heads:
        shapes = {f"decode-{s}x{c}": Shape(s, 1, c) for s, c in size.decode}
        shapes |= {f"prefill-{p.seqs}x{p.new}-of-{p.context}": p for p in size.prefill}
        for name, shape in shapes.items():
            read = 2 * shape.seqs * shape.context * heads.kv * heads.dim * n
            yield PerfCase(
                f"attend/{name}/{_named(heads)}",
                cost.attend(shape.seqs, shape.new, shape.context, heads, n),
                partial(subjects.attend, scale=size.scale, shape=shape, heads=heads),
                heads.dim,
                size.scale.streams(read),
            )


def _rows(size: Size, n: int) -> Iterator[PerfCase]:
    """Verbs on activations alone, which stay in caches."""
    scale = size.scale
    for rows in size.verb_rows:
        for width in size.widths:
            for verb, formula in (("rms_norm", cost.rms_norm), ("add_rms_norm", cost.add_rms_norm)):
                build = partial(subjects.rms_norm, scale=scale, rows=rows, width=width, fused=verb == "add_rms_norm")
                yield PerfCase(f"{verb}/{width}/rows-{rows}", formula(rows, width, n), build)
        for width in size.inner:
            build = partial(subjects.gated, scale=scale, rows=rows, width=width)
            yield PerfCase(f"gated/{width}/rows-{rows}", cost.gated(rows, width, n), build)
        for heads in size.heads:
            build = partial(subjects.rope, scale=scale, shape=rows_shape(rows, after=37), heads=heads)
            yield PerfCase(f"rope/{_named(heads)}/rows-{rows}", cost.rope(rows, heads, n), build, heads.dim)


def _sampling(size: Size, n: int) -> Iterator[PerfCase]:
    seqs, vocab = size.seqs[-1], size.head[1]
    for name, row in SAMPLING.items():
        build = partial(host.sample, seqs=seqs, vocab=vocab, row=row)
        yield PerfCase(f"sample/{name}/{vocab}/rows-{seqs}", cost.sample(seqs, vocab), build)


def _steps(size: Size, n: int) -> Iterator[PerfCase]:
    for name, spec in size.models.items():
        weights = sum(math.prod(p.shape) for p in param_specs(spec, "float32").layers[0] if p.kind.startswith("linear"))
        read = spec.layers * weights * n
        for seqs, context in size.steps:
            yield PerfCase(
                f"step/{name}/decode-{seqs}x{context}",
                cost.step(seqs, context, spec.heads, spec.layers, weights, spec.hidden, spec.vocab, n),
                partial(model.decode, spec=spec, seqs=seqs, context=context),
                spec.heads.dim,
                read >= size.scale.flush,
            )


def _named(heads: Heads) -> str:
    return f"{heads.q}x{heads.kv}x{heads.dim}"
