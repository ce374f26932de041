"""The types of GGUF tensors that are published most, against ggml's definition of their blocks (ggml-quants.c)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest

from polyradix.graph.checkpoint import open_checkpoint

Block = Callable[[bytes], list[float]]  # the values of one


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def nibbles(raw: bytes) -> list[int]:
    return [b & 15 for b in raw] + [b >> 4 for b in raw]


def fifth(raw: bytes) -> list[int]:
    bits = int.from_bytes(raw, "little")
    return [bits >> j & 1 for j in range(32)]


def q4_0(b: bytes) -> list[float]:
    return [half(b[:2]) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b: bytes) -> list[float]:
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles(b[4:])]


def q5_0(b: bytes) -> list[float]:
    return [half(b[:2]) * (q + 16 * h - 16) for q, h in zip(nibbles(b[6:]), fifth(b[2:6]), strict=True)]


def q5_1(b: bytes) -> list[float]:
    return [half(b[:2]) * (q + 16 * h) + half(b[2:4]) for q, h in zip(nibbles(b[8:]), fifth(b[4:8]), strict=True)]


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * int(q) for q in np.frombuffer(b[2:], np.int8)]


def q2_k(b: bytes) -> list[float]:
    scales, codes, d, least = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    out = []
    for i, (part, shift, at) in enumerate(product((0, 32), (0, 2, 4, 6), (0, 16))):
        for q in codes[part + at : part + at + 16]:
            out.append(d * (scales[i] & 15) * (q >> shift & 3) - least * (scales[i] >> 4))
    return out


def q3_k(b: bytes) -> list[float]:
    high, codes, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    out = []
    for i, (part, bit, at) in enumerate(product((0, 1), range(4), (0, 16))):
        low = packed[i] & 15 if i < 8 else packed[i - 8] >> 4
        scale = (low | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32
        for j in range(at, at + 16):
            q = codes[32 * part + j] >> 2 * bit & 3
            out.append(d * scale * (q - (0 if high[j] >> 4 * part + bit & 1 else 4)))
    return out


def k4_scales(packed: bytes, i: int) -> tuple[int, int]:
    """A scale and a minimum of six bits each."""
    if i < 4:
        return packed[i] & 63, packed[i + 4] & 63
    return packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4


def q4_k(b: bytes) -> list[float]:
    return k4(b[:16], bytes(32), b[16:])


def q5_k(b: bytes) -> list[float]:
    return k4(b[:16], b[16:48], b[48:])


def k4(head: bytes, high: bytes, codes: bytes) -> list[float]:
    d, least, out = half(head[:2]), half(head[2:4]), []
    for i in range(8):
        scale, low = k4_scales(head[4:], i)
        for j in range(32):
            q = codes[32 * (i // 2) + j] >> 4 * (i % 2) & 15
            out.append(d * scale * (q + 16 * (high[j] >> i & 1)) - least * low)
    return out


def q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8), half(b[208:])
    out = []
    for part, quarter, j in product((0, 1), range(4), range(32)):
        q = low[64 * part + 32 * (quarter % 2) + j] >> 4 * (quarter // 2) & 15
        q |= (high[32 * part + j] >> 2 * quarter & 3) << 4
        out.append(d * int(scales[8 * part + 2 * quarter + j // 16]) * (q - 32))
    return out


TYPES = {f.__name__.upper(): f for f in (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k)}
TWO = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), **TWO}


@pytest.mark.parametrize("name", TYPES)
def test_values_are_ggmls(tmp_path: Path, name: str) -> None:
    kind, random = gguf.GGMLQuantizationType[name], np.random.default_rng(1)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (3, 1024 // size, nbytes), np.uint8)
    for at in HALVES.get(name, (0,)):  # scales that are finite
        raw[..., at : at + 2] = random.normal(size=(*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(str(tmp_path / "x.gguf"))
    got = checkpoint.read("model.embed_tokens.weight")
    want = np.array([[v for block in row for v in TYPES[name](block.tobytes())] for row in raw])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    assert checkpoint.stored["model.embed_tokens.weight"].what == name
