"""VLIW bundles of the decode kernel: what the compiler emits, counted in its dump. Stalls on memory are not in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from math import inf
from pathlib import Path

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_tpu.aot.chips import CHIPS, Chip, prepare

BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(\w\w)? *: +(>*) ?\{", re.MULTILINE)
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
KERNEL = "*ragged_paged_attention*-??-final_bundles.txt"
PAGES = 20_000  # of the cache


def loops(text: str) -> list[int]:
    """Bundles of each loop's body in a dump of final bundles, without those of loops inside it; branches that are
    not always taken count as if they were."""
    rows = [(len(m[2]), m[1] == "LB") for m in BUNDLE.finditer(text)]
    ends = {i: _end(rows, i) for i, (_, head) in enumerate(rows) if head}
    size = {i: end - i for i, end in ends.items()}
    for i, end in ends.items():
        inner = [j for j in ends if i < j < end and rows[j][0] == rows[i][0] + 1]
        size[i] -= sum(ends[j] - j for j in inner)
    return list(size.values())


def _end(rows: list[tuple[int, bool]], head: int) -> int:
    """One past the last bundle that is as deep as the loop's head, before another loop of that depth begins."""
    depth, end = rows[head][0], head + 1
    for i in range(head + 1, len(rows)):
        if rows[i][1] and rows[i][0] <= depth:
            break
        if rows[i][0] >= depth:
            end = i + 1
    return end


def token_bytes(heads: Heads) -> int:
    """Of one token's keys and values in bfloat16, as a TPU stores them."""
    return 4 * heads.kv * -(-heads.dim // 128) * 128


def budget(chip: Chip, heads: Heads) -> float:
    """Cycles in which memory delivers a token."""
    return token_bytes(heads) / chip.bandwidth * chip.clock


def too_slow(chip: Chip, heads: Heads, bundles: float) -> tuple[str, ...]:
    """The gate's failure; chips without a limit of their own pass."""
    most = (chip.bundles or inf) * token_bytes(heads) / 1024
    return () if bundles < most else (f"bundles: {bundles:.2f} a token; expected fewer than {most:.2f}",)


def decode_bundles(chip: Chip, heads: Heads) -> float:
    """Bundles a token of the decode kernel, in a process of its own: libtpu reads its flags when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"LIBTPU_INIT_ARGS": DUMP.format(folder), "JAX_TRACEBACK_FILTERING": "off"}
        command = [sys.executable, "-m", __name__, chip.name, *map(str, (heads.q, heads.kv, heads.dim))]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        dumps = list(Path(folder).glob(KERNEL))
        if len(dumps) != 1:
            raise RuntimeError(f"{len(dumps)} dumps of a decode kernel; expected 1")
        return max(loops(dumps[0].read_text())) / int(done.stdout)


def _compile(chip: Chip, heads: Heads) -> int:
    """Compiles the kernel; the tokens that its largest loop takes at a time."""
    import jax
    import jax.numpy as jnp

    from polyradix_tpu.aot.chips import topology
    from polyradix_tpu.aot.programs import PAGE, SEQS, struct
    from polyradix_tpu.batch import Shape, unpack
    from polyradix_tpu.kernels.ragged_paged_attention import attend
    from polyradix_tpu.kernels.ragged_paged_attention.validate import plan

    mesh, shape, spec = topology(chip, 1), Shape(SEQS, SEQS, 512, 1), AttnSpec(heads, heads.dim**-0.5)
    q = struct((SEQS, heads.q, heads.dim), jnp.bfloat16, mesh)
    kv = struct((PAGES, PAGE, 2 * heads.kv, token_bytes(heads) // heads.kv // 4), jnp.bfloat16, mesh)
    vector = struct((shape.length,), jnp.int32, mesh)
    with jax.set_mesh(mesh):
        jax.jit(lambda q, kv, vector: attend(q, kv, unpack(vector, shape), spec)).lower(q, kv, vector).compile()
        return plan(kv, shape, spec, 1)[0].tokens


if __name__ == "__main__":
    prepare()
    print(_compile(CHIPS[sys.argv[1]], Heads(*map(int, sys.argv[2:]))))
