"""The simulated device itself: nothing runs that was not computed, and a graph is held to what a real one does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch_npu

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_npu import calls
from polyradix_npu.attention import Fused, Sinks
from polyradix_npu.contracts import WrongCall
from polyradix_npu.emulate.device import SimulatedDevice
from polyradix_npu.emulate.graphs import device as the_device
from polyradix_npu.meta import NpuMeta


def on(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to("npu")


def test_outside_the_simulation_a_launch_is_an_error_and_no_zeros() -> None:
    with the_device():
        x = on(3, 4)
    with pytest.raises(RuntimeError, match="507000"):
        x + 1
    with pytest.raises(RuntimeError, match="507000"):
        calls.rms_norm(x, x[0], 1e-5)


def test_a_tensor_of_the_host_among_the_devices_is_refused(device: SimulatedDevice) -> None:
    with pytest.raises(WrongCall, match="on cpu"):
        on(3, 4) + torch.ones(3, 4)


def test_an_op_without_a_kernel_of_the_device_is_refused(device: SimulatedDevice) -> None:
    with pytest.raises(WrongCall, match="would run it on the CPU"):
        torch.special.bessel_j0(on(3, 4, dtype=torch.float32))


def test_memory_is_counted(device: SimulatedDevice) -> None:
    before, _ = torch.npu.mem_get_info()
    held = torch.zeros(64 << 20, dtype=torch.uint8, device="npu")
    assert before - torch.npu.mem_get_info()[0] >= len(held)


def test_the_cubes_format_is_refused_where_rows_are_wanted(device: SimulatedDevice) -> None:
    rows, x = on(32, 64), on(5, 64)
    w = calls.fractal(rows)
    assert int(torch_npu.get_npu_format(w)) == calls.FRACTAL_NZ
    want = x.cpu().float().numpy() @ rows.cpu().float().numpy().T
    np.testing.assert_allclose(torch.nn.functional.linear(x, w).float().cpu().numpy(), want, rtol=0.01, atol=0.1)
    with pytest.raises(WrongCall, match="FRACTAL_NZ"):
        w + 1


class Captured:
    """One attention over a cache, twice plus one, captured for two sequences."""

    def __init__(self) -> None:
        self.kv = (on(4, 128, 256), on(4, 128, 256))
        self.q, self.pages = on(2, 4, 128), torch.tensor([[1], [2]], dtype=torch.int32).to("npu")
        self.mask = calls.fixed_mask(torch.device("npu"))
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph, auto_dispatch_capture=True):
            self.out = self.step([1, 1])

    def step(self, lengths: list[int]) -> torch.Tensor:
        more = {"actual_seq_qlen": [1, 2], "sparse_mode": calls.CAUSAL, "atten_mask": self.mask}
        paged = {"block_table": self.pages, "block_size": 128, "actual_seq_kvlen": lengths}
        return calls.attend(self.q + 1, self.kv, "TND", 4, 2, 0.1, **paged, **more)[0] * 2

    def replay(self, lengths: list[int]) -> np.ndarray:
        self.graph.update(cpu_update_input=[{"actual_seq_kvlen": lengths}])
        self.graph.replay()
        return self.out.float().cpu().numpy()


def test_a_replay_reads_new_lengths_and_new_values(device: SimulatedDevice) -> None:
    c = Captured()
    for lengths in ([5, 77], [9, 128]):
        np.testing.assert_array_equal(c.replay(lengths), c.step(lengths).float().cpu().numpy())
        c.q.copy_(on(2, 4, 128))


@pytest.mark.parametrize(
    ("dim", "bits", "refused"),
    [(128, 16, []), (128, 32, []), (192, 16, []), (64, 16, []), (64, 16, ["BSND"]), (64, 16, ["BSND", "BSH"])],
)
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_are_one_key_more(
    dim: int,
    bits: int,
    refused: list[str],
    window: int | None,
    device: SimulatedDevice,
    refuse: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the fused op itself, if it takes this head and bfloat16 holds the sinks, else by its log of sums, or torch."""
    refuse(*refused)
    fused = Fused(calls.fixed_mask(torch.device("npu")), "", 128)
    fused.forms(dim)
    native, attend = list[bool](), calls.attend
    monkeypatch.setattr(calls, "attend", lambda *a, **k: (native.append("learnable_sink" in k), attend(*a, **k))[1])
    random, heads = np.random.default_rng(0), Heads(4, 2, dim)
    scores = random.standard_normal(4).astype(np.float32)
    held = torch.from_numpy(scores) if bits == 32 else torch.from_numpy(scores).bfloat16().float()
    sinks = Sinks(held.to("npu"), held.bfloat16().to("npu") if bits == 16 else None)
    q, kv, pages = on(4, 4, dim), (on(3, 128, 2, dim), on(3, 128, 2, dim)), [[2, 0], [1, 2]]
    table = torch.tensor(pages, dtype=torch.int32).to("npu")
    lengths, rows = [9, 140], [0, 3, 4]
    positions = torch.tensor([6, 7, 8, 139], dtype=torch.int32).to("npu")
    m = NpuMeta(positions, positions, positions, positions, table, rows, lengths, newest=positions[2:])
    out = fused.attend(q, kv, m, AttnSpec(heads, dim**-0.5, window, sinks=sinks)).cpu().view(4, 4, dim)
    assert set(native) == (set() if len(refused) == 2 else {dim == 128 and bits == 16})
    wide, (k, v) = q.cpu().double().numpy(), (x.cpu().double().numpy() for x in kv)
    for s, t in ((0, 0), (0, 2), (1, 3)):
        place, used = int(positions[t].cpu()), pages[s]
        first = 0 if window is None else max(0, place - window + 1)
        for h in range(4):
            keys, values = (x[used, :, h // 2].reshape(-1, dim)[first : place + 1] for x in (k, v))
            weight = np.exp(keys @ wide[t, h] * dim**-0.5)
            want = weight @ values / (weight.sum() + np.exp(np.float64(held[h])))
            np.testing.assert_allclose(out[t, h].double().numpy(), want, rtol=0.02, atol=0.01)


def test_a_capture_computes_nothing(device: SimulatedDevice) -> None:
    c = Captured()
    assert c.out.isnan().all().cpu()
    cache = on(2, 128, 2, 64)
    before = cache.cpu()
    with torch.npu.graph(torch.npu.NPUGraph(), auto_dispatch_capture=True):
        calls.write(cache[0, :2], cache[0, :2], (cache, cache), c.pages[:, 0])
    assert torch.equal(cache.cpu(), before)


def test_a_replay_without_an_update_would_hang(device: SimulatedDevice) -> None:
    c = Captured()
    c.replay([5, 77])
    with pytest.raises(WrongCall, match="wait for ever"):
        c.graph.replay()


def test_an_update_is_checked_as_a_call(device: SimulatedDevice) -> None:
    c = Captured()
    with pytest.raises(WrongCall, match="lengths up to 128"):
        c.graph.update(cpu_update_input=[{"actual_seq_kvlen": [5, 129]}])
    device.updating = None


def test_copies_between_host_and_device_cannot_be_captured(device: SimulatedDevice) -> None:
    x = on(3, 4)
    for copy in (lambda: x.cpu(), lambda: x.copy_(torch.ones(3, 4)), lambda: x.sum().item()):
        graph = torch.npu.NPUGraph()
        with pytest.raises(WrongCall, match="while a graph is captured"):  # noqa: SIM117
            with torch.npu.graph(graph):
                copy()
