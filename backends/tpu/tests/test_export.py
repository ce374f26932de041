from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from polyradix.backend.protocol import Params, ParamSpec
from polyradix_tpu.export import to_nnx


def test_a_state_shares_the_arrays_and_names_their_places(model):
    m = model(tp=2)
    state = to_nnx(m.params)
    pure, specs = nnx.to_pure_dict(state), nnx.get_partition_spec(state)
    for i, layer in enumerate(m.params.layers):
        assert set(pure["layers"][i]) == set(layer)
        for name, w in layer.items():
            assert pure["layers"][i][name]["value"] is w.value
            assert specs["layers"][i][name]["value"].get_value() == w.value.sharding.spec
    assert specs["layers"][0]["o"]["value"].get_value() == PartitionSpec(None, "tp")
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(m.tree))


def test_biases_come_along(model):
    backend = model(tp=2).backend
    spec = ParamSpec("w", "linear", (4, 3), "float32", (2, 2), 0, bias=True)
    held = {"weight": np.ones((4, 3), np.float32), "bias": np.arange(4, dtype=np.float32)}
    w = backend.pack(spec, lambda part="weight": held[part])
    state = to_nnx(Params({"w": w}, []))
    assert nnx.to_pure_dict(state)["top"]["w"]["bias"].tolist() == [0, 2, 1, 3]  # rank 0 has a row of each segment
    assert nnx.get_partition_spec(state)["top"]["w"]["bias"].get_value() == PartitionSpec("tp")
