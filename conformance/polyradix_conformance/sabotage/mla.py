"""Latent attention that caches, rotates, scores or sums wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.numpy.ops import Arr, NumpyMeta, NumpyOps, Packed
from polyradix.backend.protocol import HOST_DTYPES, LatentSpec, LatentWeights
from polyradix_conformance.sabotage import sabotage

LayerKV = tuple[Arr]


class Changed(NumpyOps):
    """Latent attention by another spec, or with other weights or inputs."""

    def attend_latent(
        self, q: Arr, c: Arr, kv: LayerKV, m: NumpyMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Arr, LayerKV]:
        return super().attend_latent(q, self._c(c, a), kv, m, self._weights(w, a), self._spec(a))

    def _c(self, c: Arr, a: LatentSpec) -> Arr:
        return c

    def _weights(self, w: LatentWeights, a: LatentSpec) -> LatentWeights:
        return w

    def _spec(self, a: LatentSpec) -> LatentSpec:
        return a


@sabotage("L1/attend_latent/whole/normal")
class LatentScaleOfOwn(Changed):
    """The scale is that of the head's width, whatever was asked for."""

    def _spec(self, a: LatentSpec) -> LatentSpec:
        return replace(a, scale=float((a.nope + a.rope) ** -0.5))


@sabotage("L1/attend_latent/whole/temperature")
class TemperatureIgnored(Changed):
    """Far positions have the temperature of near ones."""

    def _spec(self, a: LatentSpec) -> LatentSpec:
        return replace(a, attn_scale=0.0)


@sabotage("L1/attend_latent/whole/temperature")
class TemperatureTooWide(Changed):
    """The temperature rises one position late."""

    def _spec(self, a: LatentSpec) -> LatentSpec:
        return replace(a, floor_scale=a.floor_scale + 1)


@sabotage("L2/latent/written", "L1/attend_latent/whole/normal")
class LatentNormUnweighted(Changed):
    """The norm of latents has no weights."""

    def _weights(self, w: LatentWeights, a: LatentSpec) -> LatentWeights:
        return replace(w, norm=replace(w.norm, value=np.ones_like(w.norm.value)))


@sabotage("L1/attend_latent/whole/normal")
class HeadsShareUp(Changed):
    """Every head has the keys and values of the first."""

    def _weights(self, w: LatentWeights, a: LatentSpec) -> LatentWeights:
        return replace(w, up=replace(w.up, value=np.repeat(w.up.value[:1], len(w.up.value), axis=0)))


@sabotage("L1/attend_latent/shape-equal-parts")
class KeysForValues(Changed):
    """Where both are as wide, value rows are taken for key rows."""

    def _weights(self, w: LatentWeights, a: LatentSpec) -> LatentWeights:
        if a.nope != a.v:
            return w
        return replace(w, up=replace(w.up, value=np.roll(w.up.value, a.v, axis=1)))


@sabotage("L2/latent/written", "L1/attend_latent/whole/normal")
class LatentPairsInterleaved(Changed):
    """Key columns are taken for pairs side by side."""

    def _c(self, c: Arr, a: LatentSpec) -> Arr:
        turned = c[:, a.rank :].reshape(len(c), -1, 2).swapaxes(1, 2).reshape(len(c), -1)
        return np.concatenate([c[:, : a.rank], turned], axis=1)


class OwnRope(NumpyOps):
    """Turns q and k, knowing which is which by the number of heads."""

    def rope(self, q: Arr, k: Arr, table: Packed, m: NumpyMeta) -> tuple[Arr, Arr]:
        turned = super().rope(q, k, table, m)
        return self._mine((q, k), turned) if k.shape[1] == 1 and q.shape[2] < 64 else turned

    def _mine(self, before: tuple[Arr, Arr], after: tuple[Arr, Arr]) -> tuple[Arr, Arr]:
        raise NotImplementedError


@sabotage("L2/latent/written", "L1/attend_latent/whole/normal")
class LatentKeyNotTurned(OwnRope):
    """The key part of a row is cached as it came."""

    def _mine(self, before: tuple[Arr, Arr], after: tuple[Arr, Arr]) -> tuple[Arr, Arr]:
        return after[0], before[1]


@sabotage("L1/attend_latent/whole/normal")
class LatentQueryNotTurned(OwnRope):
    """Queries are not rotated."""

    def _mine(self, before: tuple[Arr, Arr], after: tuple[Arr, Arr]) -> tuple[Arr, Arr]:
        return before[0], after[1]


@sabotage("L1/attend_latent/chunked")
class LatentSeesNext(NumpyOps):
    """A query sees the token after its own, where the batch has one."""

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        seen = replace(a, scale=a.scale * (1 + a.attn_scale * np.log(1 + position // a.floor_scale)), attn_scale=0.0)
        return super()._latent_row(nope, rope, held, position + 1, up, seen)


@sabotage("L1/attend_latent/every-length", "L1/attend_latent/whole")
class LatentForgetsFirst(NumpyOps):
    """The first token of a sequence is not seen by others."""

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        return super()._latent_row(nope, rope, held[1:] if position else held, max(0, position - 1), up, a)


@sabotage("L1/attend_latent/long")
class LatentWindow(NumpyOps):
    """Only the newest 512 rows are seen."""

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        first = max(0, position - 511)
        return super()._latent_row(nope, rope, held[first:], position - first, up, a)


@sabotage("L1/attend_latent/whole/normal/float32")
class LatentUpNarrow(Changed):
    """What makes keys and values is rounded to bfloat16 in a float32 model."""

    def _weights(self, w: LatentWeights, a: LatentSpec) -> LatentWeights:
        return replace(w, up=replace(w.up, value=w.up.value.astype(HOST_DTYPES["bfloat16"]).astype(w.up.value.dtype)))


@sabotage("L2/latent/batching")
class LatentSumVariant(NumpyOps):
    """Batch invariance is claimed, and scores of a lone sequence sum in another order."""

    def attend_latent(
        self, q: Arr, c: Arr, kv: LayerKV, m: NumpyMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Arr, LayerKV]:
        self._alone = m.batch.num_seqs == 1
        return super().attend_latent(q, c, kv, m, w, a)

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        if not self._alone:
            return super()._latent_row(nope, rope, held, position, up, a)
        flipped = np.concatenate([up[:, : a.nope][:, ::-1], up[:, a.nope :]], axis=1)
        return super()._latent_row(nope[:, ::-1], rope, held, position, flipped, a)


@sabotage("L1/attend_latent/decode")
class LatentOwnRowLate(NumpyOps):
    """A token does not see itself."""

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        return super()._latent_row(nope, rope, held, max(0, position - 1), up, a)


@sabotage("L2/latent/last-layer", "L2/latent/written")
class LatentFirstLayersRows(NumpyOps):
    """Every layer writes into the cache of the first."""

    def layers(self, bodies: Any, params: Any, carry: Any, kv: Any) -> Any:
        latent = len(kv) > 1 and len(kv[0]) == 1
        carry, out = super().layers(bodies, params, carry, [kv[0]] * len(kv) if latent else kv)
        return carry, kv if latent else out


@sabotage("L5/attend_latent", mesh=True)
class LatentRowsOnOneRank(NumpyOps):
    """Only the first rank writes rows."""

    def attend_latent(
        self, q: Arr, c: Arr, kv: LayerKV, m: NumpyMeta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Arr, LayerKV]:
        first: bool = self._collectives.ranks.rank == 0  # type: ignore[attr-defined]
        held = kv if first else (np.zeros_like(kv[0]),)
        return super().attend_latent(q, c if first else np.zeros_like(c), held, m, w, a)[0], kv
