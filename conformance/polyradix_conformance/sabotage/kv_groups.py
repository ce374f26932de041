"""Groups of layers that read, write or share what is another's."""

from __future__ import annotations

from typing import Any

from polyradix.backend.batch import HostBatch
from polyradix.backend.layered import LayerKV, each_array
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps
from polyradix.backend.protocol import KV, Array, AttnSpec
from polyradix_conformance.sabotage import sabotage


@sabotage("L1/kv_groups/chunked")
class GroupsShareATable(NumpyOps):
    """Every layer reads and writes by the first group's table."""

    def attend(self, q: Any, k: Any, v: Any, kv: LayerKV[Any], m: NumpyMeta, a: AttnSpec) -> tuple[Array, KV]:
        return super().attend(q, k, v, LayerKV(kv), m, a)[0], kv


@sabotage("L1/kv_groups/chunked")
class GroupsShareSlots(NumpyBackend):
    """The second group reads by its own table, and writes by the first's."""

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        meta = super().prepare(batch, prev)
        for group in meta.groups[1:]:
            object.__setattr__(group, "slots", batch.slots)
        return meta


@sabotage("L1/kv_groups/chunked")
class GroupsShareAnArray(NumpyOps):
    """The layers of a cache in groups have one array."""

    def layers(self, bodies: Any, params: Any, carry: Any, kv: Any) -> Any:
        grouped = any(layer.group for layer in kv)
        one = [LayerKV(kv[0], layer.group) if grouped else layer for layer in kv]
        return super().layers(bodies, params, carry, one)[0], kv


@sabotage("L1/kv_groups/decode")
class HiddenValuesCount(NumpyOps):
    """Values of masked keys are multiplied by a weight of 0, which leaves NaN as it is."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        out = super()._attend_row(q, keys, values, position, a)
        return out + (0 * values[: position + 1].sum(axis=0)).repeat(a.heads.q // a.heads.kv, axis=0)


@sabotage("L2/kv_groups/moved")
class CopyOfAGroup(NumpyBackend):
    """A copy takes the first array of a page alone."""

    def _copy(self, kv: Any, src: list[int], dst: list[int]) -> Any:
        super()._copy(each_array(kv)[:1], src, dst)
        return kv
