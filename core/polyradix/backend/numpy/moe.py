"""Who goes to which expert, as MoeSpec says. Rows are tokens; every computation is in the dtype it is given."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from polyradix.backend.protocol import MoeSpec

Arr: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def scores(logits: Arr, s: MoeSpec) -> Arr:
    """[T,experts] -> [T,experts]."""
    with np.errstate(over="ignore"):
        if s.scoring == "sigmoid":
            out: Arr = 1 / (1 + np.exp(-logits))
            return out
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        out = e / e.sum(axis=1, keepdims=True)
        return out


def chosen(choice: Arr, s: MoeSpec) -> Arr:
    """Ids [T,top_k] of the experts with the best choice values [T,experts], best first."""
    grouped = choice.reshape(len(choice), s.groups, -1)
    best = np.sort(grouped, axis=2)[..., -s.group_best :].sum(axis=2)
    out = np.ones(best.shape, bool)
    np.put_along_axis(out, _best(best, s.top_groups), False, axis=1)
    return _best(np.where(out[..., None], -np.inf, grouped).reshape(choice.shape), s.top_k)


def _best(values: Arr, n: int) -> Arr:
    """Columns of the n largest values of each row; of equal ones the first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :n]
