"""The CPU backend on upstream torch, and the choice between it and the native kernels."""

from __future__ import annotations

import torch

from polyradix.backend.capabilities import FEATURES, Capabilities
from polyradix.backend.protocol import Backend, Memory, ParamSpec
from polyradix_cpu import host, ipex
from polyradix_cpu.linear import PackedLinear, native_bf16
from polyradix_torch import TorchBackend, TorchOps


class TorchCPUBackend(TorchBackend):
    """Upstream torch alone: oneDNN's packed linears and tiled attention. Runs wherever torch does."""

    def __init__(self, attention: str) -> None:
        self._bf16 = torch.bfloat16 if native_bf16() else torch.float32
        own = attention == "own"
        ops = TorchOps() if own else TorchOps(ipex.IpexAttention(ipex.load()))
        super().__init__(_capabilities(own, self._bf16), ops, "cpu")

    def memory(self) -> Memory:
        return host.memory()

    def _linear(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        narrow = spec.dtype == "bfloat16" and spec.kind != "logits"  # logits are float32: rounding them would make ties
        return PackedLinear(weight, bias, self._bf16 if narrow else torch.float32)


def create(kernels: str, attention: str, threads: int | None) -> Backend:
    """See Entry.create; the values are checked there."""
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchCPUBackend(attention)


def _capabilities(own: bool, bf16: torch.dtype) -> Capabilities:
    name, sets = host.processor()
    notes = [f"kernels: torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"]
    if bf16 == torch.float32:
        notes.append("bfloat16 weights are kept as float32: this processor does not multiply bfloat16 itself")
    if not own:
        notes.append("attention: intel_extension_for_pytorch, archived; a prefix hit is not bit-exact with a miss")
    return Capabilities(
        name="cpu",
        device=f"{name} ({', '.join(sets) or 'generic'}, {torch.get_num_threads()} threads)",
        dtypes=frozenset({"float32", "bfloat16"}),
        page_sizes=(16, 32, 64, 128) if own else (16,),
        max_head_dim=512,
        head_dim_multiple=2,
        features=FEATURES,
        batch_invariant=own,
        notes=tuple(notes),
    )
