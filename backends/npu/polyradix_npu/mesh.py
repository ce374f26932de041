"""Ranks of tensor parallelism, over HCCL. Their processes import this module before torch-npu, which `start` loads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Backend
from polyradix.backend.registry import DeviceUnavailable
from polyradix_npu.device import SOURCE, start
from polyradix_torch.backend import TorchBackend
from polyradix_torch.mesh import Mesh

SIMULATED = 2  # ranks that emulation offers


def hccl(store: dist.Store, rank: int, size: int) -> Any:
    """Between Ascend devices of one host."""
    import torch_npu

    made = torch_npu._C._distributed_c10d.ProcessGroupHCCL
    options = made.Options()
    options.global_ranks_in_group = list(range(size))
    options.group_id = "polyradix"
    return made(store, rank, size, options)


def one(capture: bool, index: int, rank: int) -> TorchBackend:
    """The backend of a rank, on device index + rank."""
    start(emulated=False)
    from polyradix_npu.backend import NpuBackend

    torch.npu.set_device(index + rank)
    return NpuBackend(index + rank, capture, False)


def ranks(capture: bool, index: int, tp: int) -> Backend:
    """Over `tp` devices from `index` on. Raises DeviceUnavailable without HCCL, and Unsupported for more than there
    are."""
    if not dist.is_hccl_available():
        raise DeviceUnavailable(f"tp {tp}: this torch-npu has no HCCL: {SOURCE}, or take tp 1")
    if tp > (here := torch.npu.device_count() - index):
        raise Unsupported(f"tp {tp}", f"{here} device(s) from index {index} on")
    return Mesh(partial(one, capture, index), hccl, tp)
