"""L1: attention over ragged paged sequences against the oracle: regimes, heads, pages, window, softcap, batching."""

from __future__ import annotations

from functools import partial

from polyradix.backend.protocol import Heads
from polyradix_conformance.cases import case
from polyradix_conformance.flow import Flow
from polyradix_conformance.inputs import REGIMES, Ragged, ragged_lengths
from polyradix_conformance.oracle import Attention
from polyradix_conformance.rig import Rig

GQA = Heads(q=4, kv=2, dim=64)
LAYOUTS = {"mha": Heads(q=2, kv=2, dim=64), "mqa": Heads(q=4, kv=1, dim=64), "gqa": GQA}
PLANS = ("whole", "decode", "chunked", "mixed")
PAGE_SIZES = (1, 8, 16, 32, 64, 128)


def attend(
    rig: Rig,
    plan: str,
    heads: Heads = GQA,
    regime: str = "normal",
    page: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    page = page or rig.page
    ragged = Ragged(ragged_lengths(page), page)
    flow = Flow(rig, ragged, heads, Attention(heads.dim**-0.5, window, softcap), regime)
    flow.check(f"attend {plan}", getattr(ragged, plan)())


for dtype in ("float32", "bfloat16"):
    for plan in PLANS:
        for regime in REGIMES:
            case(f"L1/attend/{plan}/{regime}", dtype, partial(attend, plan=plan, regime=regime))
        for window in (1, 7, 40):
            body = partial(attend, plan=plan, window=window)
            case(f"L1/attend/{plan}/window-{window}", dtype, body, features=("window",))
        case(f"L1/attend/{plan}/softcap", dtype, partial(attend, plan=plan, softcap=1.5), features=("softcap",))
    for name, heads in LAYOUTS.items():
        case(f"L1/attend/heads-{name}", dtype, partial(attend, plan="mixed", heads=heads))
    for dim in (32, 80, 96, 128, 256):
        case(f"L1/attend/dim-{dim}", dtype, partial(attend, plan="mixed", heads=Heads(2, 1, dim)), head_dim=dim)
    for page in PAGE_SIZES:
        case(f"L1/attend/page-{page}", dtype, partial(attend, plan="mixed", page=page), page_size=page)
