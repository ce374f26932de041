"""Mixtures of experts that choose, weigh or compute wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.numpy.ops import Arr, NumpyOps, Packed
from polyradix.backend.protocol import HOST_DTYPES, MoeSpec, MoeWeights
from polyradix_conformance.sabotage import sabotage


class Rerouted(NumpyOps):
    """Routing by another spec."""

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        return super()._route(x, router, self._changed(s))

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return s


@sabotage("L1/moe/softmax/")
class NotRenormalised(Rerouted):
    """Weights of experts do not sum to 1."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, renormalise=False)


@sabotage("L1/moe/unnormalised/")
class Renormalised(Rerouted):
    """Weights of experts always sum to 1."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, renormalise=True)


@sabotage("L1/moe/scale/")
class ScaleLeftOut(Rerouted):
    """The scale of routed experts is left out."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, scale=1.0)


@sabotage("L1/moe/sigmoid/")
class SoftmaxForSigmoid(Rerouted):
    """Scores are a softmax, whatever was asked for."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, scoring="softmax")


@sabotage("L1/moe/groups/")
class GroupsIgnored(Rerouted):
    """Experts are chosen from all groups."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, groups=1, top_groups=1, group_best=1)


@sabotage("L1/moe/groups/")
class GroupByBest(Rerouted):
    """A group counts as much as its best expert."""

    def _changed(self, s: MoeSpec) -> MoeSpec:
        return replace(s, group_best=1)


@sabotage("L1/moe/softmax/bias")
class SelectionBiasIgnored(NumpyOps):
    """Experts are chosen by their scores alone."""

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        return super()._route(x, replace(router, bias=None), s)


class OwnRoute(NumpyOps):
    """Choice values to ids, and ids to weights, by methods of its own."""

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        ids, weights = super()._route(x, router, s)
        plain = replace(s, renormalise=False, scale=1.0, top_k=s.experts, groups=1, top_groups=1, group_best=1)
        all_ids, sorted_scores = super()._route(x, replace(router, bias=None), plain)
        score = np.empty_like(sorted_scores)
        np.put_along_axis(score, all_ids, sorted_scores, axis=1)
        bias = np.zeros(s.experts, score.dtype) if router.bias is None else router.bias
        return self._mine(ids, weights, score, bias, s)

    def _mine(self, ids: Arr, weights: Arr, score: Arr, bias: Arr, s: MoeSpec) -> tuple[Arr, Arr]:
        raise NotImplementedError

    def _weights(self, value: Arr, ids: Arr, s: MoeSpec) -> Any:
        out = np.take_along_axis(value, ids, axis=1)
        return (out / out.sum(axis=1, keepdims=True) if s.renormalise else out) * s.scale


@sabotage("L1/moe/softmax/bias")
class SelectionBiasWeighs(OwnRoute):
    """The selection bias is part of the weights."""

    def _mine(self, ids: Arr, weights: Arr, score: Arr, bias: Arr, s: MoeSpec) -> tuple[Arr, Arr]:
        return ids, self._weights(score + bias, ids, s)


@sabotage("L1/moe/ties")
class TiesToTheHigherId(OwnRoute):
    """Of equal values the higher id wins."""

    def _mine(self, ids: Arr, weights: Arr, score: Arr, bias: Arr, s: MoeSpec) -> tuple[Arr, Arr]:
        if s.groups > 1:
            return ids, weights
        ids = np.argsort(score + bias, axis=1, kind="stable")[:, ::-1][:, : s.top_k]
        return ids, self._weights(score, ids, s)


@sabotage("L1/moe/groups/bias")
class GroupsMaskedByZero(OwnRoute):
    """Experts of other groups have the choice value 0, which is the best one when all are negative."""

    def _mine(self, ids: Arr, weights: Arr, score: Arr, bias: Arr, s: MoeSpec) -> tuple[Arr, Arr]:
        if s.groups == 1:
            return ids, weights
        grouped = (score + bias).reshape(len(score), s.groups, -1)
        best = np.sort(grouped, axis=2)[..., -s.group_best :].sum(axis=2)
        kept = np.zeros(best.shape, bool)
        np.put_along_axis(kept, np.argsort(-best, axis=1, kind="stable")[:, : s.top_groups], True, axis=1)
        masked = np.where(kept[..., None], grouped, 0).reshape(score.shape)
        ids = np.argsort(-masked, axis=1, kind="stable")[:, : s.top_k]
        return ids, self._weights(score, ids, s)


@sabotage("L1/moe/softmax/float32")
class RouterNarrow(NumpyOps):
    """Logits of the router are rounded to bfloat16."""

    def _product(self, x: Arr, w: Packed) -> Arr:
        out = super()._product(x, w)
        return out.astype(HOST_DTYPES["bfloat16"]).astype(out.dtype) if w.spec.kind == "router" else out


@sabotage("L1/moe/softmax/")
class ExpertGateSwapped(NumpyOps):
    """Experts take their up rows for gate rows."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        gate, up = np.split(w.gate_up.value, 2, axis=1)
        swapped = replace(w.gate_up, value=np.concatenate([up, gate], axis=1))
        return super().moe(x, replace(w, gate_up=swapped), s)


@sabotage("L1/moe/empty", "L1/moe/counts")
class ExpertCapacity(NumpyOps):
    """An expert takes 16 tokens and drops the others."""

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        ids, weights = super()._route(x, router, s)
        for e in range(s.experts):
            rows, place = np.nonzero(ids == e)
            weights[rows[16:], place[16:]] = 0
        return ids, weights


@sabotage("L1/moe/empty")
class LastExpertUnused(NumpyOps):
    """The last expert gives nothing."""

    def _route(self, x: Arr, router: Packed, s: MoeSpec) -> tuple[Arr, Arr]:
        ids, weights = super()._route(x, router, s)
        return ids, np.where(ids == s.experts - 1, 0, weights)


@sabotage("L4/moe", "L1/moe/alone")
class ExpertsSumVariant(NumpyOps):
    """Batch invariance is claimed, and the products of experts sum in another order for one row than for several."""

    def _product(self, x: Arr, w: Packed) -> Arr:
        if len(x) > 1 or w.spec.kind != "experts":
            return super()._product(x, w)
        return super()._product(x[:, ::-1], replace(w, value=np.ascontiguousarray(w.value[:, ::-1])))


@sabotage("L5/moe", mesh=True)
class ExpertsFromZero(NumpyOps):
    """Every rank takes its experts for the first ones."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        return super().moe(x, replace(w, down=replace(w.down, first=0)), s)


@sabotage("L1/moe/biased-logits")
class LogitsBiasChooses(NumpyOps):
    """A bias of logits is added to choice values."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        return super().moe(x, w, replace(s, bias="choice"))


@sabotage("L1/moe/clamped")
class ExpertsBiasLost(NumpyOps):
    """The bias of the second product is lost."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        return super().moe(x, replace(w, down=replace(w.down, bias=None)), s)


@sabotage("L1/moe/clamped")
class DownBiasOnce(NumpyOps):
    """The bias of the second product is not weighted."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        out = super().moe(x, replace(w, down=replace(w.down, bias=None)), s)
        if w.down.bias is None:
            return out
        ids, _ = self._route(x, w.router, s)
        whole: Arr = out + w.down.bias[ids].sum(axis=1)
        return whole.astype(x.dtype)


@sabotage("L1/moe/clamped")
class GateUnclamped(NumpyOps):
    """A gate's limit is far off."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        return super().moe(x, w, s if s.limit is None else replace(s, limit=1e9))


@sabotage("L1/moe/clamped")
class AlphaOne(NumpyOps):
    """A clamped gate's sigmoid is SiLU's."""

    def moe(self, x: Arr, w: MoeWeights, s: MoeSpec) -> Arr:
        return super().moe(x, w, replace(s, alpha=1.0))
