"""What ahead-of-time compilation does without libtpu; tests/aot has the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from polyradix.backend.protocol import Heads, ParamSpec
from polyradix.graph.dense import param_specs
from polyradix.graph.errors import ModelError
from polyradix_tpu.aot import chips
from polyradix_tpu.aot.__main__ import main
from polyradix_tpu.aot.bundles import budget, loops, too_slow
from polyradix_tpu.aot.chips import CHIPS
from polyradix_tpu.aot.gates import Row, table
from polyradix_tpu.aot.programs import read_model
from polyradix_tpu.mesh import abstract, make_mesh

DUMP = (Path(__file__).parent / "final_bundles.txt").read_text()  # of a loop of 13 bundles in one of 47 more
EIGHT = Heads(8, 2, 128)  # Llama-3.1-8B's of one of four ranks


def test_a_missing_libtpu_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    assert main(["--chip", "v5e"]) == 2
    assert "libtpu is not installed; pip install 'polyradix-tpu[aot]'" in capsys.readouterr().err


def test_bundles_are_counted_by_loop():
    assert loops(DUMP) == [47, 13]
    inner = [line for line in DUMP.splitlines() if 0x29 <= int(line.split()[0], 16) <= 0x35]
    assert loops("\n".join(inner)) == [13]
    assert loops(DUMP.replace("LB", "PF")) == []


def test_a_slow_kernel_fails_where_there_is_a_limit():
    v5e = CHIPS["v5e"]
    assert budget(v5e, EIGHT) == pytest.approx(1.87, abs=0.01)
    assert too_slow(v5e, EIGHT, 2.49) == ()
    assert too_slow(v5e, EIGHT, max(loops(DUMP)) / 16) == ("bundles: 2.94 a token; expected fewer than 2.50",)
    assert too_slow(v5e, replace(EIGHT, kv=4), 4.99) == ()
    assert too_slow(CHIPS["v6e"], EIGHT, 100.0) == ()


def test_the_table_names_failed_gates():
    good = Row("v5e", "decode step", 1.0, 10**9, 2 * 10**9, 3 * 10**9, 0.25, {"all-reduce": 2}, 1.5, 1.87)
    bad = replace(good, chip="v6e", failures=("temp: 3 bytes; expected fewer than 2",))
    _, first, second, last = table([good, bad]).splitlines()
    numbers = "1.0 1.000 2.000 3.000 25% 2 all-reduce 1.50 of 1.87 ok"
    assert " ".join(first.split()) == f"v5e decode step {numbers}"
    assert second.endswith(" FAILS temp")
    assert last == "FAILED v6e, decode step: temp: 3 bytes; expected fewer than 2"


def test_models_are_named_or_files(tmp_path):
    known = read_model("llama-3.1-8b")
    assert (known.layers, known.heads, known.max_position) == (32, Heads(32, 8, 128), 131_072)
    with pytest.raises(ModelError, match=r"'nope'; expected one of llama-3.1-8b, or the path"):
        read_model("nope")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="architectures is None"):
        read_model(str(tmp_path / "config.json"))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_abstract_parameter_is_what_is_placed(model, tp):
    m = model(tp)
    mesh = make_mesh(jax.devices(), tp)
    specs = param_specs(m.spec, "float32")
    specs = [(p, m.params.top) for p in specs.top] + [(p, m.params.layers[0]) for p in specs.layers[0]]
    for spec, held in specs:
        assert described(abstract(mesh, spec)) == described(held[spec.name])


def test_an_abstract_bias_and_rows_that_do_not_divide(model):
    backend, mesh = model(4).backend, make_mesh(jax.devices(), 4)
    for spec in (
        ParamSpec("a", "linear", (8, 4), "float32", (4, 4), 0, bias=True),
        ParamSpec("b", "linear_reduce", (8, 4), "bfloat16", (), 1, bias=True),
        ParamSpec("c", "logits", (7, 4), "float32", (), 0),
    ):
        placed = backend.pack(spec, lambda part="weight", s=spec: host(s, part))
        assert described(abstract(mesh, spec)) == described(placed)


def host(spec, part):
    return np.ones(spec.shape if part == "weight" else spec.shape[:1], np.float32)


def described(w):
    arrays = [(x.shape, x.dtype, x.sharding) for x in (w.value, w.bias) if x is not None]
    return arrays, w.rows, w.axis
