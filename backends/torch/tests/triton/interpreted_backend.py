"""TritonOps on CPU tensors, as a backend for the conformance cases."""

from __future__ import annotations

import pytest
import torch
from exact_interpreter import install

from polyradix.backend.capabilities import FEATURES, KV_GROUPS, QUANTS, Capabilities
from polyradix.backend.protocol import Memory
from polyradix_torch.gpu import TritonBackend
from polyradix_torch.triton.ops import TritonOps

CPU = torch.device("cpu")


class Interpreted(TritonBackend):
    """Decode cuts keys into `splits` parts."""

    def __init__(self, splits: int) -> None:
        caps = Capabilities(
            name="interpreted",
            device="CPU",
            dtypes=frozenset({"float32", "bfloat16"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES | QUANTS | {"kv_fp8", KV_GROUPS},
            max_tp=2,
        )
        super().__init__(caps, TritonOps(), "cpu")
        self.splits = splits

    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 31)


def interpreted(rank: int) -> Interpreted:
    """Of a mesh; other processes than rank 0's have no fixture that makes the interpreter exact."""
    if rank:
        torch.set_num_threads(1)
        install(pytest.MonkeyPatch())
    return Interpreted(1)
