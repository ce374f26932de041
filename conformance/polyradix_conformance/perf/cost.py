"""Bytes and floating-point operations of one call, by formula.

Bytes: every input and output once, as if nothing stayed on the chip: weights, activations in and out, and for attention
the keys and values of each sequence's whole context. Embedding rows, page tables and other int32 indices count nothing.
Operations: a multiply and an add are two; exp, division and square root are one each; a comparison is one. A whole step
counts the weights, the cache and the logits, because activations between verbs need not leave the chip. `size` is the
bytes of one value of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyradix.backend.protocol import Heads


@dataclass(frozen=True)
class Cost:
    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def linear(rows: int, k: int, n: int, size: int, out_size: int | None = None) -> Cost:
    """[rows,k] by [n,k]; logits give `out_size` 4."""
    return Cost((k * n + rows * k) * size + rows * n * (out_size or size), 2 * rows * k * n)


def attend(seqs: int, new: int, context: int, heads: Heads, size: int) -> Cost:
    """`new` queries each of `seqs` sequences, that see `context` keys at the end: keys and values are read once per
    sequence, q, k and v come in, k and v are written to the cache, the output goes out."""
    row = heads.kv * heads.dim
    cache = 2 * seqs * context * row
    moved = seqs * new * (2 * heads.q * heads.dim + 4 * row)
    return Cost((cache + moved) * size, 4 * heads.q * heads.dim * seen(seqs, new, context))


def seen(seqs: int, new: int, context: int) -> int:
    """Query-key pairs of causal attention."""
    return seqs * (new * context - new * (new - 1) // 2)


def rms_norm(rows: int, width: int, size: int) -> Cost:
    """Square, sum, scale, weight."""
    return Cost((2 * rows + 1) * width * size, 4 * rows * width)


def add_rms_norm(rows: int, width: int, size: int) -> Cost:
    """Two inputs, two outputs."""
    return Cost((4 * rows + 1) * width * size, 5 * rows * width)


def rope(rows: int, heads: Heads, size: int) -> Cost:
    """q and k in and out, and a row of the float32 table for each row; six operations turn two values."""
    values = rows * (heads.q + heads.kv) * heads.dim
    return Cost(2 * values * size + rows * heads.dim * 4, 3 * values)


def gated(rows: int, width: int, size: int) -> Cost:
    """[rows, 2 width] to [rows, width]: exp, add, divide, multiply."""
    return Cost(3 * rows * width * size, 4 * rows * width)


def sample(rows: int, vocab: int) -> Cost:
    """Logits are read once; one comparison each."""
    return Cost(4 * rows * vocab, rows * vocab)


def step(seqs: int, context: int, heads: Heads, layers: int, weights: int, hidden: int, vocab: int, size: int) -> Cost:
    """A decode step of a whole model; `weights` is the number of values in the linears of one layer."""
    cache = 2 * seqs * context * heads.kv * heads.dim
    attention = 4 * heads.q * heads.dim * seqs * context
    head = linear(seqs, hidden, vocab, size, 4)
    return Cost(layers * (weights + cache) * size, layers * (2 * seqs * weights + attention)) + head
