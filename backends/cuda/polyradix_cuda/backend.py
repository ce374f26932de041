"""The host side of the CUDA backend."""

from __future__ import annotations

from functools import partial

import torch

from polyradix.backend.capabilities import FEATURES, KV_GROUPS, QUANTS
from polyradix.backend.protocol import Backend
from polyradix_torch.errors import all_told
from polyradix_torch.gpu import GpuBackend, on_gpus, use_gpu
from polyradix_torch.triton.ops import TritonOps

OLDEST = (8, 0)  # the first compute capability with bfloat16 products


@all_told(torch.cuda)
class CudaBackend(GpuBackend):
    fork = True

    def __init__(self, index: int, capture: bool) -> None:
        super().__init__("cuda", FEATURES | QUANTS | {"kv_fp8", KV_GROUPS}, TritonOps(), index, capture)


def create(capture: bool, index: int, tp: int) -> Backend:
    """Raises RuntimeError, saying what is wrong with the GPU, its driver or this torch; and Unsupported for more ranks
    than there are GPUs."""
    return on_gpus(partial(one, capture), index, tp)


def one(capture: bool, index: int) -> CudaBackend:
    """A rank's, or the only one."""
    use_gpu(index)
    have, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    what = f"GPU {index} has compute capability {have[0]}.{have[1]}"
    if have < OLDEST:
        raise RuntimeError(f"{what}; expected at least 8.0")
    if not any(_runs(arch, have) for arch in built):
        raise RuntimeError(f"{what}; torch {torch.__version__} was built for {', '.join(built)}: install a newer one")
    return CudaBackend(index, capture)


def _runs(arch: str, have: tuple[int, int]) -> bool:
    """Whether code for `arch` runs: sm_ on its own major version, compute_ (PTX) on any newer."""
    kind, _, digits = arch.partition("_")
    version = int("".join(filter(str.isdigit, digits)) or 0)
    return version <= 10 * have[0] + have[1] and (kind == "compute" or version // 10 == have[0])
