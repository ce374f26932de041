"""Expert parallelism on the simulated device. Ranks are threads of one process, each on a simulated device of its own;
they meet in every op, by the name of their group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from polyradix_npu.contracts import WrongCall
from polyradix_npu.contracts_exchange import room

Args = SimpleNamespace
T = TypeVar("T")
MARK = 128  # int32 values for a row in what dispatch tells combine; the first three say whose row it was


class Group:
    """Raises WrongCall where the device would wait for ever, which shows after `timeout` seconds."""

    def __init__(self, size: int, timeout: float = 60) -> None:
        self._meet, self._posts = Barrier(size, timeout=timeout), list[Any]([None] * size)

    def swap(self, rank: int, what: Any) -> list[Any]:
        """Everybody's, by rank."""
        self._posts[rank] = what
        try:
            self._meet.wait()
            held = list(self._posts)
            self._meet.wait()
        except BrokenBarrierError:
            raise WrongCall(f"rank {rank} waits for ranks that do not come; the device would wait for ever") from None
        return held


GROUPS: dict[str, Group] = {}


def on_ranks(size: int, run: Callable[[int, str], T], timeout: float = 60) -> list[T]:
    """run(rank, name of the group) of each rank. Raises what the first that failed raised."""
    from polyradix_npu.emulate.device import SimulatedDevice

    name = f"simulated-{size}"
    GROUPS[name] = Group(size, timeout)

    def one(rank: int) -> T:
        with SimulatedDevice():
            return run(rank, name)

    try:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))
    finally:
        del GROUPS[name]


def _swap(c: Args, what: tuple[Any, ...]) -> list[Any]:
    if c.group_ep not in GROUPS:
        raise WrongCall(f"group_ep is {c.group_ep}; expected the name of a group that there is: {sorted(GROUPS)}")
    said = (c.ep_world_size, c.moe_expert_num, tuple(c.expert_ids.shape))
    held = GROUPS[c.group_ep].swap(c.ep_rank_id, (said, *what))
    if any(other != said for other, *_ in held):
        raise WrongCall(f"rank {c.ep_rank_id} has (world, experts, ids) {said}; expected the same on all ranks")
    return [rest for _, *rest in held]


def dispatch(c: Args) -> tuple[torch.Tensor, ...]:
    """Received rows by expert, then by rank, then by token; the rest is undefined."""
    most, own = room(c), c.moe_expert_num // c.ep_world_size
    first, top_k = c.ep_rank_id * own, c.expert_ids.shape[1]
    rows, scales = c.x.new_full((most, c.x.shape[1]), float("nan")), torch.full((most,), float("nan"))
    marks = torch.zeros(most, MARK, dtype=torch.int32)
    arrived = torch.zeros(own, c.ep_world_size, dtype=torch.int32)
    for at, (e, rank, token, k, x, weights) in enumerate(_taken(c, first, own) if c.write else ()):
        rows[at], marks[at, :3] = x[token], torch.tensor([rank, token, k])
        if weights is not None:
            scales[at] = weights[token, k]
        arrived[e, rank] += 1
    counts, sums = arrived.sum(1, dtype=torch.int64), arrived.flatten().cumsum(0, dtype=torch.int32)
    if c.expert_scales is None:
        scales = scales[:0]
    else:  # and where the A2 keeps what its nodes have added up already
        more = 2 * len(c.x) * c.ep_world_size * top_k * (c.ep_world_size // 8)
        sums = torch.cat([sums, torch.zeros(more, dtype=torch.int32)])
    marks = torch.cat([marks.flatten(), torch.zeros(max(0, c.expert_ids.numel() - marks.numel()), dtype=torch.int32)])
    counts = counts if c.expert_token_nums_type else counts.cumsum(0)
    unused = torch.full((most,), float("nan")), torch.empty(c.tp_world_size, dtype=torch.int32)
    return rows, unused[0], marks, counts, sums, unused[1], scales


def _taken(c: Args, first: int, own: int) -> Any:
    """Of each row that comes here: expert, rank, token, choice, and that rank's rows and weights."""
    weights = None if c.expert_scales is None else c.expert_scales.clone()
    held = _swap(c, (c.x.clone(), c.expert_ids.clone(), weights))
    for e in range(own):
        for rank, (x, ids, scales) in enumerate(held):
            for token, k in (ids == first + e).nonzero().tolist():
                yield e, rank, token, k, x, scales


def combine(c: Args) -> torch.Tensor:
    """The sum over choices of weight times what came back."""
    out = torch.zeros(len(c.expert_ids), c.expand_x.shape[1])
    if c.write:
        sent = int(c.ep_send_counts[c.moe_expert_num - 1])
        for rows, marks in _swap(c, (c.expand_x[:sent].clone(), c.assist_info_for_combine.view(-1, MARK)[:sent, :3])):
            for row, (rank, token, k) in zip(rows, marks.tolist(), strict=True):
                if rank == c.ep_rank_id:
                    out[token] += c.expert_scales[token, k] * row.float()
    return out.to(c.expand_x.dtype)
