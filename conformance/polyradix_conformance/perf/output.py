"""The table and the JSON of a run; the schema is schema/perf-1.json."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from polyradix.backend.capabilities import Capabilities
from polyradix_conformance.perf.measure import Measured
from polyradix_conformance.perf.roofline import Ceilings
from polyradix_conformance.report import PERF, head, seal


def entry(m: Measured, ceilings: Ceilings) -> dict[str, Any]:
    """One case of the JSON. `share` is of the ceiling, and null unless the outputs were right."""
    least, bound = ceilings.seconds(m.case.cost)
    seconds = m.timing.median if m.timing else None
    return {
        "id": m.case.id,
        "seconds": seconds,
        "bytes": m.case.cost.bytes,
        "flops": m.case.cost.flops,
        "bound": bound,
        "share": least / seconds if seconds and m.status == "pass" else None,
        "status": m.status,
        "detail": m.detail,
    }


def build(
    backend: str, options: dict[str, Any], caps: Capabilities, dtype: str, partial: bool, size: str,
    ceilings: Ceilings, measured: Sequence[Measured],
) -> dict[str, Any]:  # fmt: skip
    """A sealed file. `partial`: not every case, or not at serving shapes."""
    return seal(
        {
            **head(PERF, datetime.now(UTC)),
            "backend": backend,
            "options": options,
            "emulated": caps.emulated,
            "device": caps.device,
            "size": size,
            "partial": partial,
            "ceilings": {
                "read_gb_s": ceilings.read,
                "gflop_s": {dtype: ceilings.flops},
                "how": "; ".join(ceilings.how),
            },
            "cases": [entry(m, ceilings) for m in measured],
        }
    )


def table(made: dict[str, Any]) -> str:
    """A line per case; what is wrong or not done says why."""
    cases = made["cases"]
    wide = max(len(c["id"]) for c in cases)
    head = f"{'':{wide}} {'us':>10} {'GB/s':>8} {'GFLOP/s':>9} {'bound':>8} {'share':>6}"
    return "\n".join([head, *(_line(c, wide) for c in cases), *_ceilings(made["ceilings"])])


def _line(c: dict[str, Any], wide: int) -> str:
    if c["status"] != "pass":
        return f"{c['id']:{wide}} {c['status']}: {c['detail']}"
    s = c["seconds"]
    rates = f"{c['bytes'] / s / 1e9:8.2f} {c['flops'] / s / 1e9:9.1f}"
    return f"{c['id']:{wide}} {s * 1e6:10.1f} {rates} {c['bound']:>8} {c['share']:6.0%} {c['detail']}".rstrip()


def _ceilings(c: dict[str, Any]) -> list[str]:
    operations = ", ".join(f"{v:.1f} GFLOP/s in {dtype}" for dtype, v in c["gflop_s"].items())
    return [f"ceilings: {c['read_gb_s']:.2f} GB/s, {operations} ({c['how']})"]
