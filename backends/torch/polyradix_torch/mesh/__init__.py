"""Tensor parallelism for torch-based backends, over torch.distributed."""

from polyradix_torch.mesh.backend import Mesh
from polyradix_torch.mesh.collectives import gloo, nccl

__all__ = ["Mesh", "gloo", "nccl"]
