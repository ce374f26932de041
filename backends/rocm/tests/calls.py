"""One good call of every adapter, small, and what it was called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.simulator import Simulator

I32 = torch.int32


class Recorder(Simulator):
    """Remembers the last arguments of each call, by name."""

    def __init__(self, arch: str = "gfx942", version: str = "0.1.20") -> None:
        super().__init__(arch, version)
        self.given: dict[str, dict[str, Any]] = {}

    def function(self, path: str) -> Callable[..., Any]:
        return partial(self._recorded, path)

    def _recorded(self, path: str, /, *args: Any, **given: Any) -> Any:
        name = path.rpartition(".")[2]
        out = super().function(path)(*args, **given)
        self.given[name] = dict(zip(self.signatures[path].parameters, args, strict=False)) | given
        return out


class Calls:
    """Two sequences of 3 and 5 tokens, 1 new one each or 2 and 3; 16 slots; 16 heads of 128, or latent rows of 576."""

    def __init__(self, provider: Simulator, seed: int = 0) -> None:
        self.aiter, self._random = Aiter(provider), torch.Generator().manual_seed(seed)
        self.indptr, self.ones = torch.tensor([0, 3, 8], dtype=I32), torch.ones(2, dtype=I32)
        self.slots = torch.tensor([9, 2, 4, 15, 0, 1, 7, 8], dtype=I32)
        self.cu_one, self.cu_q = torch.tensor([0, 1, 2], dtype=I32), torch.tensor([0, 2, 5], dtype=I32)

    def values(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random).bfloat16()

    @cached_property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.values(16, 1, 2, 128), self.values(16, 1, 2, 128)

    def all(self) -> dict[str, Any]:
        """The results, by the name of the last call made for each."""
        a, v, logits = self.aiter, self.values, self.values(5, 16).float()
        w1, w2 = a.shuffled(v(16, 256, 128)), a.shuffled(v(16, 128, 128))
        ids, weights = a.topk_softmax(logits, 3, True)
        x, table = v(5, 128), torch.randn(64, 32, generator=self._random)
        keys, cache = (self.indptr, self.slots, self.ones), v(16, 1, 576)
        work = a.mla_work(self.cu_one, self.indptr, self.ones, 16)
        y, scale = a.quantised(v(5, 256), torch.float8_e4m3fnuz)
        flat = cache.view(16, 1, 1, 576)
        long = torch.tensor([3, 4, 5, 6, 11])
        return {
            "rmsnorm2d_fwd": a.rms_norm(x, v(128), 1e-5),
            "rmsnorm2d_fwd_with_add": a.add_rms_norm(x, v(5, 128), v(128), 1e-5),
            "rope_cached_positions_2c_fwd": a.rope(v(5, 4, 64), v(5, 2, 64), table.cos(), table.sin(), long),
            "paged_attention_ragged": a.decode(v(2, 4, 128), self.kv, *keys, 5, 0.1, 0.0),
            "mha_batch_prefill_func": a.prefill(v(5, 4, 128), self.kv, self.cu_q, *keys, (3, 5), 0.1, 0.0, None),
            "flash_attn_varlen_func": a.varlen(
                v(5, 4, 192), v(8, 4, 192), v(8, 4, 128), self.cu_q, self.indptr, (3, 5), 0.1
            ),
            "concat_and_cache_mla": a.write_latent(v(5, 512), v(5, 64), cache, long),
            "mla_decode_fwd": a.mla_decode(v(2, 16, 576), flat, self.cu_one, *keys, 0.1, work),
            "fused_moe": a.fused_moe(x, w1, w2, ids, weights),
            "grouped_topk": a.topk_grouped(logits, 3, (4, 2), False, True, 2.5),
            "biased_grouped_topk": a.topk_biased(logits, torch.zeros(16), 3, (4, 2), 2.5),
            "gemm_a8w8_blockscale": a.block_product(y, v(128, 256).to(torch.float8_e4m3fnuz), scale, torch.ones(1, 2)),
        }
