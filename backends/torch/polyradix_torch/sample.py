"""The contract's sampling (polyradix.backend.sampling) in torch, on whatever device the logits are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from polyradix.backend.batch import SampleBatch

WORD = 0xFFFFFFFF


def sample(logits: torch.Tensor, batch: SampleBatch, argmax: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """logits [S,V] float32 -> i32[S]; `argmax` gives the lowest index among equals."""
    device, logits = logits.device, adjusted(logits, batch)
    if batch.mask is not None:
        logits = logits.masked_fill(~allowed(batch.mask, logits.shape[1], device), -float("inf"))
    if batch.greedy:
        return argmax(logits)
    number = torch.from_numpy(np.stack([batch.seed, batch.position, batch.top_k])).to(device, non_blocking=True)
    real = torch.from_numpy(np.stack([batch.temperature, batch.top_p, batch.min_p])).to(device, non_blocking=True)
    temperature = real[0, :, None]
    z = torch.where(temperature > 0, logits / temperature.clamp(min=1e-30), logits)
    kept = z
    if batch.top_k.any() or (batch.top_p < 1).any() or batch.min_p.any():
        kept = _narrow(z, number[2, :, None], real[1, :, None], real[2, :, None])
    score = torch.where(temperature > 0, kept + gumbel(number[0], number[1], logits.shape[1]), logits)
    return argmax(score)


def adjusted(logits: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
    """Logits [S,V] as batch.adjust changes them: a copy, or the same where it changes nothing."""
    if batch.adjust is None:
        return logits
    a, device = batch.adjust, logits.device
    where = torch.from_numpy(np.stack([a.row, a.id]).astype(np.int64)).to(device, non_blocking=True)
    factor, add = torch.from_numpy(np.stack([a.factor, a.add])).to(device, non_blocking=True)
    x = logits[where[0], where[1]]
    return logits.index_put((where[0], where[1]), torch.where(x > 0, x / factor, x * factor) + add)


def allowed(mask: np.ndarray, vocab: int, device: torch.device) -> torch.Tensor:
    """bool [S,V] of the mask's bits, i32 [S,ceil(V/32)]."""
    words = torch.from_numpy(mask).to(device, non_blocking=True)
    bits = torch.arange(32, dtype=torch.int32, device=device)
    return (words[:, :, None] >> bits & 1).bool().flatten(1)[:, :vocab]


def _narrow(z: torch.Tensor, k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """z with -inf where top_k, top_p or min_p remove a token; ranks are by z descending, then by id."""
    ranked, order = torch.sort(z, dim=1, descending=True, stable=True)
    rank = torch.arange(z.shape[1], device=z.device)
    ranked = ranked.masked_fill((k > 0) & (rank >= k), -float("inf"))
    p = ranked.softmax(1)
    stays = ((p.cumsum(1) - p < top_p) | (top_p == 1)) & (p >= min_p * p[:, :1])
    stays[:, 0] = True
    return torch.full_like(z, -float("inf")).scatter_(1, order, ranked.masked_fill(~stays, -float("inf")))


def _mix(h: torch.Tensor) -> torch.Tensor:
    """The murmur3 finaliser on uint32 values held in int64."""
    h = h ^ h >> 16
    h = h * 0x85EBCA6B & WORD
    h = h ^ h >> 13
    h = h * 0xC2B2AE35 & WORD
    return h ^ h >> 16


def gumbel(seed: torch.Tensor, position: torch.Tensor, vocab: int) -> torch.Tensor:
    """Noise [S,V] float32; seed and position int32 [S]."""
    start = _mix(_mix(seed.long() & WORD) ^ position.long() & WORD)
    h = _mix(start[:, None] ^ torch.arange(vocab, device=seed.device))
    u = ((h >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
