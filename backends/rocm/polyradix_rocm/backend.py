"""The host side of the ROCm backend."""

from __future__ import annotations

import torch

from polyradix.backend.capabilities import FEATURES
from polyradix_rocm.device import arch_of
from polyradix_torch.errors import all_told
from polyradix_torch.gpu import GpuBackend, use_gpu
from polyradix_torch.triton.ops import TritonOps


@all_told(torch.cuda)
class RocmBackend(GpuBackend):
    def __init__(self, index: int, capture: bool) -> None:
        super().__init__("rocm", FEATURES - {"mla", "indexer"}, TritonOps(), index, capture)


def create(capture: bool, index: int) -> RocmBackend:
    """Raises RuntimeError, saying what is wrong with the GPU, its driver or this torch."""
    if torch.version.hip is not None:
        use_gpu(index)
    arch_of(torch, index)
    return RocmBackend(index, capture)
