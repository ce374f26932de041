"""L1: attention over ragged paged sequences against the oracle: regimes, heads, pages, window, softcap, batching."""

from __future__ import annotations

from functools import partial

import numpy as np

from polyradix.backend.protocol import Heads
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.flow import Flow
from polyradix_conformance.inputs import REGIMES, Part, Ragged, ragged_lengths
from polyradix_conformance.oracle import EXACT, Attention
from polyradix_conformance.rig import Rig
from polyradix_conformance.tolerance import floor

GQA = Heads(q=4, kv=2, dim=64)
LAYOUTS = {"mha": Heads(q=2, kv=2, dim=64), "mqa": Heads(q=4, kv=1, dim=64), "gqa": GQA}
PLANS = ("whole", "decode", "chunked", "mixed")
SINKS = (0.5, 3.0, -20.0, 12.0)
PAGE_SIZES = (1, 8, 16, 32, 64, 128)


def attend(
    rig: Rig,
    plan: str,
    heads: Heads = GQA,
    regime: str = "normal",
    page: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: tuple[float, ...] = (),
) -> None:
    page = page or rig.page
    ragged = Ragged(ragged_lengths(page), page)
    flow = Flow(rig, ragged, heads, Attention(heads.dim**-0.5, window, softcap, sinks), regime)
    flow.check(f"attend {plan}", getattr(ragged, plan)())


def long(rig: Rig, sinks: tuple[float, ...] = ()) -> None:
    """The last tokens of a sequence longer than the partitions of any kernel; the rest is imported."""
    heads, attention, n, new = Heads(2, 1, 64), Attention(0.125, sinks=sinks), 1000, 3
    flow = Flow(rig, Ragged((n,), rig.page), heads, attention)
    data = rig.export(flow.kv, range(flow.ragged.num_pages))
    data[:, :1] = flow.contents([Part(0, 0, n - new)])
    flow.kv = rig.backend.import_pages(flow.kv, range(flow.ragged.num_pages), data)
    q, k, v = np.split(flow.x.reshape(n, -1, heads.dim), [heads.q, heads.q + heads.kv], axis=1)
    truth, *others = (oracle.attend(p, q[-new:], k, v, attention) for p in (EXACT, *oracle.emulated(rig.dtype)))
    rig.close("attend", flow.step([Part(0, n - new, n)]), truth, floor(truth, others, rig.dtype))


for dtype in ("float32", "bfloat16"):
    case("L1/attend/long", dtype, long)
    case("L1/attend/long/sinks", dtype, partial(long, sinks=(6.5, 5.0)), features=("sinks",))
    case(
        "L5/attend/sinks/tp-2",
        dtype,
        partial(attend, plan="mixed", sinks=SINKS),
        features=("sinks",),
        tp=2,
        profile="mesh",
    )
    for plan in PLANS:
        for regime in REGIMES:
            case(f"L1/attend/{plan}/{regime}", dtype, partial(attend, plan=plan, regime=regime))
        for window in (1, 7, 40):
            body = partial(attend, plan=plan, window=window)
            case(f"L1/attend/{plan}/window-{window}", dtype, body, features=("window",))
        body = partial(attend, plan=plan, sinks=SINKS)
        case(f"L1/attend/{plan}/sinks", dtype, body, features=("sinks",))
        body = partial(attend, plan=plan, sinks=SINKS, window=7, softcap=1.5)
        case(f"L1/attend/{plan}/sinks-window-softcap", dtype, body, features=("sinks", "softcap", "window"))
        case(f"L1/attend/{plan}/softcap", dtype, partial(attend, plan=plan, softcap=1.5), features=("softcap",))
        case(f"L1/attend/{plan}/softcap-50", dtype, partial(attend, plan=plan, softcap=50.0), features=("softcap",))
    for name, heads in LAYOUTS.items():
        case(f"L1/attend/heads-{name}", dtype, partial(attend, plan="mixed", heads=heads))
    for dim in (32, 80, 96, 128, 256):
        case(f"L1/attend/dim-{dim}", dtype, partial(attend, plan="mixed", heads=Heads(2, 1, dim)), head_dim=dim)
    for page in PAGE_SIZES:
        case(f"L1/attend/page-{page}", dtype, partial(attend, plan="mixed", page=page), page_size=page)
