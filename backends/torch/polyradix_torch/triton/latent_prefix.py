"""First rows of latent caches that many sequences share, read once for them all (Hydragen, Juravsky et al., 2024)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import LatentSpec
from polyradix_torch.triton.attention import LOG2E, MEMBERS, MUCH, UNIT, Paged, Plan, _precision, _shared
from polyradix_torch.triton.attention import PLAN as LISTS
from polyradix_torch.triton.cuts import cut
from polyradix_torch.triton.early import early, start

# By bytes of a number, on chips with little and with MUCH shared memory: queries (sequences times heads) of a program.
SHARED = {2: (Plan(32, 8, 2, 32), Plan(64, 8, 3, 64)), 4: (Plan(16, 8, 1, 16), Plan(16, 8, 1, 16))}


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def unit(scale, attn_scale, floor_scale, position):
    """What turns a score of a query into units of log2."""
    return scale * LOG2E * (1.0 + attn_scale * tl.log(1.0 + (position // floor_scale).to(tl.float32)))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=LISTS)
def _common(
    absorbed, turned, cache, part, lse, single, cu_q, kv_len, page_start, pages, members, items, scale, attn_scale,
    floor_scale, H, splits, EACH: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROPE: tl.constexpr, OP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    WARM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One item of a plan: rows of a tile are HEADS heads of up to EACH sequences. All see all of its keys."""
    start(EARLY)
    item = items + 5 * tl.program_id(0)
    j = tl.arange(0, EACH * HEADS)
    member, h = tl.program_id(1) * EACH + j // HEADS, tl.program_id(2) * HEADS + j % HEADS
    count = tl.load(item + 1)
    if tl.program_id(1) * EACH >= count:
        return
    mine, begin, end = members + tl.load(item), tl.load(item + 2), tl.load(item + 3)
    rows = (member < count) & (h < H)
    row = tl.load(mine + member, mask=rows, other=0).to(tl.int64)
    s = tl.load(single + row)
    r, d = tl.arange(0, RP), tl.arange(0, OP)
    query = row * H + h
    inside = rows[:, None] & (r < R)[None, :]
    q = tl.load(absorbed + query[:, None] * R + r[None, :], mask=inside, other=0.0)
    token = tl.load(cu_q + s).to(tl.int64) * H + h
    inside = rows[:, None] & (d < ROPE)[None, :]
    q_rope = tl.load(turned + token[:, None] * ROPE + d[None, :], mask=inside, other=0.0)
    log2 = scale * LOG2E
    if WARM:
        warm = unit(scale, attn_scale, floor_scale, tl.load(kv_len + s) - 1)
        log2 = warm[:, None]
    own = pages + tl.load(page_start + tl.load(single + tl.load(mine)))
    top = tl.full((EACH * HEADS,), -1e30, tl.float32)
    total = tl.zeros((EACH * HEADS,), tl.float32)
    acc = tl.zeros((EACH * HEADS, RP), tl.float32)
    for block in tl.range(begin, end, BLOCK, disable_licm=True):
        at = block + tl.arange(0, BLOCK)
        page = tl.load(own + at // PAGE).to(tl.int64)
        held = cache + ((page * PAGE + at % PAGE) * (R + ROPE))[:, None]
        c = tl.load(held + r[None, :], mask=(r < R)[None, :], other=0.0)
        k = tl.load(held + R + d[None, :], mask=(d < ROPE)[None, :], other=0.0)
        score = dot(q, tl.trans(c), tl.zeros((EACH * HEADS, BLOCK), tl.float32), PRECISION)
        score = dot(q_rope, tl.trans(k), score, PRECISION) * log2
        new = tl.maximum(top, tl.max(score, 1))
        fix = tl.exp2(top - new)
        p = tl.exp2(score - new[:, None])
        total = total * fix + tl.sum(p, 1)
        acc = dot(p.to(c.dtype), c, acc * fix[:, None], PRECISION)
        top = new
    row = tl.load(mine + member, mask=rows, other=0, volatile=True).to(tl.int64)  # again: if kept, it would be spilled
    to = (row * H + h) * SLOTS + splits + tl.load(item + 4)
    inside = rows[:, None] & (r < R)[None, :]
    tl.store(part + to[:, None] * R + r[None, :], acc / total[:, None], mask=inside)
    tl.store(lse + to, top + tl.log2(total), mask=rows)


def launch(
    absorbed: torch.Tensor, turned: torch.Tensor, cache: torch.Tensor, part: torch.Tensor, lse: torch.Tensor,
    splits: int, at: Paged, a: LatentSpec,
) -> None:  # fmt: skip
    """Into part [n,H,slots,R] and lse [n,H,slots], float32, behind the parts of each sequence's own rows: of queries
    absorbed [n,H,R] of the n sequences in `single`, and turned [T,H,rope]."""
    assert at.shared is not None
    (_, heads, slots), size = lse.shape, absorbed.element_size()
    few, many = SHARED[size]
    plan = cut(absorbed.device, "common", str(size), many if _shared(absorbed.device) >= MUCH else few)
    together = min(plan.rows, triton.next_power_of_2(heads))
    each = max(1, min(MEMBERS, plan.rows // together))
    x, rank = at.shared, absorbed.shape[2]
    _common[(len(x.items), triton.cdiv(MEMBERS, each), triton.cdiv(heads, together))](
        absorbed, turned, cache, part, lse, at.single, at.cu_q, at.kv_len, at.page_start, at.pages, x.members, x.items,
        a.scale, a.attn_scale, a.floor_scale, heads, splits, each, together, rank, padded(rank), a.rope,
        padded(a.rope), cache.shape[1], min(plan.keys, UNIT), slots, a.attn_scale != 0, _precision(absorbed),
        **early(absorbed.device), num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def padded(n: int) -> int:
    """Columns of a block; products need 16."""
    return max(16, int(triton.next_power_of_2(n)))
