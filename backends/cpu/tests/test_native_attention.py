"""The native attention against NumPy in float64: ragged batches over shuffled, poisoned pages; and its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import AttnSpec, Heads, KVSpec
from polyradix_cpu.native import (
    LayerKV,
    NativeMeta,
    NativeOps,
    alloc_kv,
    copy_pages,
    export_pages,
    import_pages,
    kv_page_bytes,
    load,
)  # fmt: skip

F32, BF16 = torch.float32, torch.bfloat16
NAMES: dict[Any, Any] = {F32: "float32", BF16: "bfloat16"}


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    library = load()
    assert library is not None, "no native library: build it with `pip install -e backends/cpu`"
    return NativeOps(library, threads=2)


class Case:
    """Sequences of given lengths with their q, k and v, and a cache whose pages are shuffled and full of NaN."""

    def __init__(self, lengths: list[int], heads: Heads, page: int, dtype: Any, seed: int = 0) -> None:
        self.rng, self.heads, self.page, self.lengths = np.random.default_rng(seed), heads, page, lengths

        def make(n: int) -> list[Any]:
            return [torch.from_numpy(self.rng.normal(size=(t, n, heads.dim)) * 2).to(dtype) for t in lengths]

        self.q, self.k, self.v = make(heads.q), make(heads.kv), make(heads.kv)
        per = [-(-t // page) for t in lengths]
        ids = self.rng.permutation(np.arange(1, sum(per) + 3))
        self.pages = np.zeros((len(lengths), max(per) + 1), np.int32)
        for s, n in enumerate(per):
            self.pages[s, :n], ids = ids[:n], ids[n:]
        spec = KVSpec(1, heads.kv, heads.dim, page, NAMES[dtype])
        (self.kv,) = alloc_kv(spec, sum(per) + 3)
        self.kv.data.fill_(float("nan"))

    def run(self, ops: NativeOps, a: AttnSpec, parts: list[tuple[int, int, int]]) -> list[Any]:
        """One batch of (sequence, from, to) token ranges; the rows of each part."""
        counts = [to - start for _, start, to in parts]
        rows = [(s, p) for s, start, to in parts for p in range(start, to)]
        slots = [self.pages[s, p // self.page] * self.page + p % self.page for s, p in rows]
        cu = np.cumsum([0, *counts])
        zeros = np.zeros(len(rows), np.int32)
        host = HostBatch(
            zeros, np.array([p for _, p in rows], np.int32), np.array(slots, np.int32), cu.astype(np.int32),
            np.array([to for *_, to in parts], np.int32), self.pages[[s for s, *_ in parts]],
            (cu[1:] - 1).astype(np.int32), zeros - 1,
        )  # fmt: skip
        q, k, v = (torch.cat([x[s][start:to] for s, start, to in parts]) for x in (self.q, self.k, self.v))
        fused = torch.cat([q, k, v], 1)  # as qkv gives them: views with a common row stride
        q, k, v = fused.split([self.heads.q, self.heads.kv, self.heads.kv], 1)
        out, _ = ops.attend(q, k, v, self.kv, NativeMeta(host), a)
        return list(out.split(counts))

    def want(self, s: int, a: AttnSpec) -> Any:
        t, group = self.lengths[s], self.heads.q // self.heads.kv
        q, k, v = (x[s].double().numpy() for x in (self.q, self.k, self.v))
        scores = np.einsum("qhd,khd->hqk", q, k.repeat(group, 1)) * a.scale
        if a.softcap:
            scores = a.softcap * np.tanh(scores / a.softcap)
        i, j = np.arange(t)[:, None], np.arange(t)
        scores = np.where((j <= i) & (j > i - (a.window or t)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v.repeat(group, 1)).reshape(t, -1)


CASES = [
    (Heads(3, 3, 16), 16, None, None),
    (Heads(9, 3, 64), 16, None, None),
    (Heads(4, 1, 48), 48, 20, None),
    (Heads(8, 1, 32), 32, 64, 5.0),
    (Heads(2, 2, 256), 128, 1, 30.0),
    (Heads(16, 2, 80), 64, None, 50.0),
]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("heads", "page", "window", "softcap"), CASES)
def test_matches_numpy(ops: NativeOps, heads: Heads, page: int, window: Any, softcap: Any, dtype: Any) -> None:
    case = Case([1, page - 1, page, page + 1, 63, 64, 65, 131], heads, page, dtype)
    a = AttnSpec(heads, heads.dim**-0.5, window, softcap)
    got = case.run(ops, a, [(s, 0, t) for s, t in enumerate(case.lengths)])
    bound = 2e-5 if dtype == F32 else 2.0**-8 * 5
    for s, y in enumerate(got):
        assert np.abs(y.double().numpy() - case.want(s, a)).max() < bound


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("heads", "page", "window", "softcap"), CASES)
def test_same_bits_whole_chunked_decoded(
    ops: NativeOps, heads: Heads, page: int, window: Any, softcap: Any, dtype: Any
) -> None:
    lengths = [70, 133]
    a = AttnSpec(heads, heads.dim**-0.5, window, softcap)
    whole = Case(lengths, heads, page, dtype).run(ops, a, [(1, 0, 133), (0, 0, 70)])[::-1]
    case = Case(lengths, heads, page, dtype)
    first = case.run(ops, a, [(0, 0, 66), (1, 0, 37)])
    second = case.run(ops, a, [(1, 37, 129)])
    tokens = [case.run(ops, a, [(0, 66 + i, 67 + i), (1, 129 + i, 130 + i)]) for i in range(4)]
    assert torch.equal(torch.cat([first[0], *(t[0] for t in tokens)]), whole[0])
    assert torch.equal(torch.cat([first[1], *second, *(t[1] for t in tokens)]), whole[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pages_travel(ops: NativeOps, dtype: Any) -> None:
    heads, spec = Heads(4, 2, 32), KVSpec(2, 2, 32, 16, NAMES[dtype])
    case = Case([40], heads, 16, dtype)
    a = AttnSpec(heads, 0.2)
    case.run(ops, a, [(0, 0, 40)])
    out = export_pages([case.kv], [int(p) for p in case.pages[0, :3]])
    slots = out[:, 0].transpose(0, 1, 2, 3, 4).reshape(2, 48, 2, 32)[:, :40].astype(np.float32)
    assert np.array_equal(slots[0], case.k[0].float().numpy())
    assert np.array_equal(slots[1], case.v[0].float().numpy())
    kv = alloc_kv(spec, 9)
    both = np.concatenate([out, out[::-1]], 1)
    import_pages(kv, [7, 1, 4], both)
    copy_pages(kv, [7, 1], [2, 3])
    again = export_pages(kv, [2, 3, 4])
    assert again.dtype == both.dtype
    assert np.array_equal(again.view(np.uint8), both.view(np.uint8))
    assert kv_page_bytes(spec) == sum(layer.data[0].numel() * layer.data.element_size() for layer in kv)


def test_unsupported_shapes_are_refused(ops: NativeOps) -> None:
    for heads, dim, page in ((2, 24, 16), (2, 272, 16), (2, 64, 24)):
        with pytest.raises(Unsupported):
            alloc_kv(KVSpec(1, heads, dim, page, "float32"), 2)
        with pytest.raises(Unsupported):
            kv_page_bytes(KVSpec(1, heads, dim, page, "float32"))
    case = Case([3], Heads(2, 2, 32), 16, F32)
    wrong = LayerKV(case.kv.data.to(BF16), 16, 32, 2)
    case.kv = wrong
    with pytest.raises(Unsupported, match="attend"):
        case.run(ops, AttnSpec(Heads(2, 2, 32), 0.2), [(0, 0, 3)])
