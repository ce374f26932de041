"""Optional: the attention verb through Intel's extension for PyTorch (`PagedAttention`). Off by default.

The extension is archived, with known security issues that nobody fixes, and its last release works with torch 2.8 only:
docs/decisions/010-ipex.md. Asked for with create(attention="ipex") or POLYRADIX_CPU_ATTENTION=ipex. Interface:
https://intel.github.io/intel-extension-for-pytorch/cpu/latest/tutorials/api_doc.html
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import AttnSpec
from polyradix_torch import TorchMeta

PACKAGE = "intel_extension_for_pytorch"
FEATURE = "attention 'ipex'"


def load() -> Any:
    """The PagedAttention class. Raises Unsupported, saying what to do, when it is missing or made for another torch."""
    try:
        extension = importlib.import_module(PACKAGE)
        paged = importlib.import_module(f"{PACKAGE}.llm.modules").PagedAttention
    except Exception as e:  # importing it with another torch fails in many ways, not all of them ImportError
        raise Unsupported(FEATURE, f"{PACKAGE} cannot be imported with torch {torch.__version__}: {e}") from e
    made_for, have = (str(version).split(".")[:2] for version in (extension.__version__, torch.__version__))
    if made_for != have:
        raise Unsupported(
            FEATURE, f"{PACKAGE} is {extension.__version__}, torch {torch.__version__}; expected the same minor version"
        )
    return paged


class IpexAttention:
    """(q [T,Hq,D], layer's KV, meta, spec) -> [T,Hq*D]: one paged call for all sequences, prefill and decode."""

    def __init__(self, paged: Any) -> None:
        self._paged = paged

    def __call__(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], m: TorchMeta, a: AttnSpec
    ) -> torch.Tensor:
        if a.sinks is not None:
            raise Unsupported("sinks", "attention of intel_extension_for_pytorch")
        k, v = (cache.transpose(1, 2) for cache in kv)  # it wants [pages, kv_heads, page_size, D]
        out = torch.empty_like(q)
        starts = torch.tensor(m.rows, dtype=torch.int32)
        lengths = torch.tensor(m.kv_len, dtype=torch.int32)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
        self._paged.flash_attn_varlen_func(
            out,
            q.contiguous(),
            k,
            v,
            starts,
            ends,
            int((starts[1:] - starts[:-1]).max()),
            max(m.kv_len),
            a.scale,
            True,
            m.pages.int(),
            None,
            window_size_left=-1 if a.window is None else a.window - 1,
            window_size_right=-1 if a.window is None else 0,
            softcap=-1.0 if a.softcap is None else a.softcap,
        )
        return out.flatten(1)
