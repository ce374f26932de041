"""What torch-based backends share: the verbs in plain torch, and a Backend that a vendor package subclasses."""

from polyradix_torch.backend import TorchBackend
from polyradix_torch.host import done, to_numpy, to_torch, torch_dtype
from polyradix_torch.ops import Linear, TorchMeta, TorchOps

__all__ = ["Linear", "TorchBackend", "TorchMeta", "TorchOps", "done", "to_numpy", "to_torch", "torch_dtype"]
