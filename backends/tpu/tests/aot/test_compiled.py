"""The real TPU compiler on small models: what passes, and for each gate something that must not. Needs libtpu."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix.backend.protocol import Heads, IndexSpec, LatentSpec
from polyradix_tpu.aot import programs
from polyradix_tpu.aot.bundles import decode_bundles, too_slow
from polyradix_tpu.aot.chips import CHIPS, topology
from polyradix_tpu.aot.gates import Program, build
from polyradix_tpu.aot.programs import read_model, steps, struct
from polyradix_tpu.batch import Shape, unpack
from polyradix_tpu.kernels import AUTO, XLA, choose
from polyradix_tpu.kernels.mla_attention import sparse
from polyradix_tpu.ops import JaxOps

LLAMA = replace(read_model("llama-3.1-8b"), layers=1, vocab=32000)
SMALL = replace(LLAMA, heads=Heads(16, 4, 64), hidden=1024, intermediate=4096, qkv_bias=True, qk_norm=True)
PALLAS = choose("pallas", on_tpu=True)


def gates(row):
    return [failure.split(":")[0] for failure in row.failures]


@pytest.mark.parametrize("chip", CHIPS)
def test_the_step_of_llama_passes_every_gate(chip):
    for program in steps(CHIPS[chip], LLAMA, 4, PALLAS):
        row = build(CHIPS[chip], program)
        assert row.failures == ()
        assert row.alias > 4e9
        assert 0.85 < row.share < 1


def test_a_narrow_head_takes_the_lanes_of_a_wide_one():
    """The cache of heads of 64 is as large as the backend says, by the compiler's count."""
    assert build(CHIPS["v6e"], next(steps(CHIPS["v6e"], SMALL, 2, PALLAS))).failures == ()


def test_the_decode_kernel_keeps_its_limit():
    heads = Heads(8, 2, 128)
    bundles = decode_bundles(CHIPS["v5e"], heads)
    assert bundles > 0.5
    assert too_slow(CHIPS["v5e"], heads, bundles) == ()


def test_a_model_larger_than_the_chip_is_told_by_how_much():
    with pytest.raises(MemoryError, match=r"the weights take [\d,]+ bytes of each device and 16,911,433,728 are there"):
        next(steps(CHIPS["v5e"], replace(LLAMA, layers=40), 1, PALLAS))


class Chatty(JaxOps):
    """Sums once more than it need to."""

    def last(self, x, m):
        return self._collectives.all_reduce(super().last(x, m))


def test_one_sum_too_many_fails(monkeypatch):
    monkeypatch.setattr(programs, "JaxOps", Chatty)
    row = build(CHIPS["v5e"], next(steps(CHIPS["v5e"], LLAMA, 4, PALLAS)))
    assert row.failures == (
        "collectives: {'all-reduce': 3, 'all-gather': 1}; expected {'all-reduce': 2, 'all-gather': 1}",
    )


def program(fn, args, donated=0, alias=None, temp=None):
    alias = args[0].size * args[0].dtype.itemsize if alias is None else alias
    lower = partial(jax.jit(fn, donate_argnums=donated).lower, *args)
    return Program("a control", args[0].sharding.mesh, lower, alias, temp)


def pool(chip, *shape, dtype=jnp.bfloat16):
    return struct(shape, dtype, topology(CHIPS[chip], 1))


@pytest.mark.parametrize("chip", CHIPS)
def test_a_layout_whose_writes_copy_the_cache_fails(chip):
    """[pages, 2, Hk, page, D]; and the one that is used, [pages, page, 2*Hk, D]."""

    def split(kv, rows, at):
        page, slot = at // 16, at % 16
        return kv.at[page, 0, :, slot].set(rows[:, :2]).at[page, 1, :, slot].set(rows[:, 2:])

    def together(kv, rows, at):
        return kv.at[at // 16, at % 16].set(rows)

    rows, at = pool(chip, 64, 4, 128), pool(chip, 64, dtype=jnp.int32)
    for write, shape, gate in ((split, (2, 2, 16), ["temp"]), (together, (16, 4), [])):
        kv = pool(chip, 50_000, *shape, 128)
        assert gates(build(CHIPS[chip], program(write, (kv, rows, at), temp=1 << 26))) == gate


@pytest.mark.parametrize(("chip", "kernels"), [("v5e", PALLAS), ("tpu7x", AUTO), ("v5e", XLA)])
def test_attention_over_selected_rows_copies_no_cache(chip, kernels):
    a, s = LatentSpec(16, 512, 128, 64, 128, 0.07, 1e-6), IndexSpec(64, 128, 128, 1e-6)
    shape, held = Shape(8, 8, 8, 1), pool(chip, 30_000, 64, 768)
    args = held, pool(chip, 8, 16, 576), pool(chip, 8, 64, 128), pool(chip, 8, 64, dtype=jnp.float32)
    vector = pool(chip, shape.length, dtype=jnp.int32)

    def attend(cache, q, index, weights, vector):
        return sparse.attend(q, index, weights, cache, unpack(vector, shape), a, s, kernels.scores)

    row = build(CHIPS[chip], program(attend, (*args, vector), donated=(), alias=0, temp=1 << 26))
    assert row.failures == ()


def test_a_cache_that_is_not_donated_fails():
    kv = pool("v5e", 1 << 20, 128)
    row = build(CHIPS["v5e"], program(lambda kv: kv + 1, (kv,), donated=()))
    assert row.failures == ("alias: 0 bytes are updated in place; expected 268,435,456",)


@pytest.mark.parametrize(("rows", "gate"), [(1 << 22, []), (1 << 26, ["HBM fits"])])
def test_what_is_larger_than_the_memory_fails(rows, gate):
    kv = pool("v5e", rows, 128)
    assert gates(build(CHIPS["v5e"], program(lambda kv: kv + 1, (kv,)))) == gate


@pytest.mark.parametrize(("rows", "gate"), [(1 << 10, []), (1 << 20, ["compiles"])])
def test_a_kernel_larger_than_vmem_fails(rows, gate):
    def copy(x, out, scratch):
        scratch[:8] = x[...]
        out[...] = scratch[:8]

    def kernel(x):
        return pl.pallas_call(copy, out_shape=x, scratch_shapes=[pltpu.VMEM((rows, 128), jnp.float32)])(x)

    x = pool("v5e", 8, 128, dtype=jnp.float32)
    assert gates(build(CHIPS["v5e"], program(kernel, (x,), donated=(), alias=0))) == gate


@pytest.mark.parametrize(("layers", "code", "verdict"), [(1, 0, "ok"), (40, 1, "FAILS HBM fits")])
def test_the_command_prints_a_table_and_exits_with_the_verdict(tmp_path, layers, code, verdict):
    config = json.loads((programs.Path(programs.__file__).parent / "llama-3.1-8b.json").read_text())
    path, out = tmp_path / "config.json", tmp_path / "table.json"
    path.write_text(json.dumps(config | {"num_hidden_layers": layers}))
    args = ["--chip", "v5e", "--model", str(path), "--kernels", "xla", "--json", str(out)]
    done = subprocess.run([sys.executable, "-m", "polyradix_tpu.aot", *args], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert verdict in done.stdout
    assert [row["failures"] == [] for row in json.loads(out.read_text())] == ([True] * 2 if not code else [False])
