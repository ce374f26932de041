"""The wiring of the optional attention, over a stand-in that keeps the extension's documented signature."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import AttnSpec, Heads, KVSpec
from polyradix_cpu import entry

NAME = "intel_extension_for_pytorch"
HEADS = Heads(4, 2, 8)


class PagedAttention:
    """Caches are [pages, kv_heads, page_size, D]; window sizes and softcap are off when negative."""

    @classmethod
    def flash_attn_varlen_func(
        cls,
        output,
        query,
        key_cache,
        value_cache,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        scale,
        is_cusal,
        block_tables,
        alibi_slopes,
        window_size_left=-1,
        window_size_right=-1,
        kv_cache_dtype="auto",
        k_scale=1.0,
        v_scale=1.0,
        softcap=-1.0,
    ):
        assert {t.dtype for t in (cu_seqlens_q, cu_seqlens_kv, block_tables)} == {torch.int32}
        assert (cu_seqlens_q.diff().max(), cu_seqlens_kv.diff().max()) == (max_seqlen_q, max_seqlen_kv)
        assert is_cusal
        assert alibi_slopes is None
        page = key_cache.shape[2]
        for s, length in enumerate(cu_seqlens_kv.diff().tolist()):
            first, stop = cu_seqlens_q[s : s + 2].tolist()
            for row in range(first, stop):
                position = length - (stop - row)
                low = 0 if window_size_left < 0 else max(0, position - window_size_left)
                seen = [(int(block_tables[s, p // page]), p % page) for p in range(low, position + 1)]
                for head in range(query.shape[1]):
                    source = head // (query.shape[1] // key_cache.shape[1])
                    k, v = (torch.stack([c[i, source, j] for i, j in seen]).double() for c in (key_cache, value_cache))
                    scores = k @ query[row, head].double() * scale
                    scores = scores if softcap < 0 else softcap * torch.tanh(scores / softcap)
                    output[row, head] = (torch.softmax(scores, 0) @ v).to(output.dtype)


@pytest.fixture
def extension(monkeypatch):
    def install(version):
        package, llm, modules = (types.ModuleType(n) for n in (NAME, f"{NAME}.llm", f"{NAME}.llm.modules"))
        package.__version__, modules.PagedAttention = version, PagedAttention
        for module in (package, llm, modules):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.delenv("POLYRADIX_CPU_KERNELS", raising=False)
    return install


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5)])
def test_it_answers_as_our_own_attention_does(extension, monkeypatch, window, softcap):
    extension(torch.__version__)
    monkeypatch.setenv("POLYRADIX_CPU_ATTENTION", "ipex")
    other = entry.create()
    monkeypatch.delenv("POLYRADIX_CPU_ATTENTION")
    own = entry.create(kernels="torch")
    batch = HostBatch(
        tokens=np.arange(20, dtype=np.int32),
        positions=np.array([*range(18), 0, 1], np.int32),
        slots=np.array([*range(48, 64), 16, 17, 32, 33], np.int32),
        cu_q=np.array([0, 18, 20], np.int32),
        kv_len=np.array([18, 2], np.int32),
        pages=np.array([[3, 1], [2, 0]], np.int32),
        last=np.array([17, 19], np.int32),
        from_prev=np.full(20, -1, np.int32),
    )
    random = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(20, heads, HEADS.dim, generator=random) for heads in (4, 2, 2))
    a = AttnSpec(HEADS, 0.4, window, softcap)
    outs = []
    for backend in (own, other):
        kv = backend.alloc_kv(KVSpec(1, HEADS.kv, HEADS.dim, 16, "float32"), 5)
        outs.append(backend.ops.attend(q, k, v, kv[0], backend.prepare(batch), a)[0])
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def test_its_claims_are_smaller(extension):
    extension(torch.__version__)
    caps = entry.create(attention="ipex").caps
    assert (caps.batch_invariant, caps.page_sizes) == (False, (16,))
    assert any("archived" in note for note in caps.notes)


def test_it_is_off_by_default(extension):
    extension(torch.__version__)
    assert not any("extension" in note for note in entry.create().caps.notes)


def test_a_missing_package_is_named(extension):
    with pytest.raises(Unsupported, match=f"{NAME} cannot be imported with torch {torch.__version__.split('+')[0]}"):
        entry.create(attention="ipex")


def test_a_package_for_another_torch_is_refused(extension):
    extension("2.8.0")
    with pytest.raises(Unsupported, match=r"2\.8\.0.*expected the same minor version"):
        entry.create(attention="ipex")


def test_native_kernels_have_no_such_attention(extension):
    extension(torch.__version__)
    with pytest.raises(ValueError, match="expected kernels 'torch' or 'auto'"):
        entry.create(kernels="native", attention="ipex")
