"""The simulator refuses what AITER's sources say is wrong, and agrees with AITER's own Python where that runs."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from calls import Calls, Recorder

from polyradix_rocm.aiter.calls import CALLS, PATHS, Aiter
from polyradix_rocm.ops import served
from polyradix_rocm.simulator import Refused, Simulator

Change = Callable[[dict[str, Any]], Any]


def but(name: str, change: Callable[[Any], Any]) -> Change:
    """The arguments with one of them changed."""
    return lambda given: {**given, name: change(given[name])}


def wider(x: torch.Tensor) -> torch.Tensor:
    return x.long() if x.dtype == torch.int32 else x.float()


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values and shape, rows apart."""
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


def put(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(-1)[at] = value
        return x

    return changed


WRONG: list[tuple[str, Change, str]] = [
    ("rmsnorm2d_fwd", but("weight", wider), "weight is torch.float32; expected torch.bfloat16"),
    ("rmsnorm2d_fwd", but("input", strided), "input is not contiguous"),
    ("rmsnorm2d_fwd", but("input", lambda x: x[None]), "input has shape"),
    ("rmsnorm2d_fwd", lambda g: {"input": g["input"][:, :12].contiguous(), "weight": g["weight"][:12], "epsilon": 1e-5},
     "width 12; expected a multiple of 8"),
    ("rmsnorm2d_fwd", lambda g: {**g, "eps": 1}, "got an unexpected keyword argument 'eps'"),
    ("rmsnorm2d_fwd_with_add", but("residual_out", lambda x: x[:-1]), "residual_out has shape"),
    ("rope_cached_positions_2c_fwd", but("cos", strided), "cos is not contiguous"),
    ("rope_cached_positions_2c_fwd", but("positions", put(0, 64)), "positions goes from 4 to 64; expected 0 to 63"),
    ("rope_cached_positions_2c_fwd", but("positions", lambda x: x.int()), "positions is torch.int32"),
    ("rope_cached_positions_2c_fwd", but("rotate_style", lambda n: 1), "only half-split"),
    ("paged_attention_ragged", but("kv_page_indices", wider), "kv_page_indices is torch.int64; expected torch.int32"),
    ("paged_attention_ragged", but("kv_page_indices", put(3, 16)), "kv_page_indices goes from 0 to 16"),
    ("paged_attention_ragged", but("kv_page_indices", put(3, -1)), "kv_page_indices goes from -1"),
    ("paged_attention_ragged", but("kv_indptr", put(1, 0)), "a sequence has no key"),
    ("paged_attention_ragged", but("kv_indptr", put(1, 9)), "expected to rise from 0"),
    ("paged_attention_ragged", but("workspace_buffer", lambda x: x[:-1]), "workspace_buffer has shape"),
    ("paged_attention_ragged", but("max_num_partitions", lambda n: 0), "max_num_partitions is 0 for 5"),
    ("paged_attention_ragged", but("k_scale", lambda x: 1.0), "k_scale is float; expected a tensor"),
    ("paged_attention_ragged", but("kv_last_page_lens", put(0, 2)), "kv_last_page_lens goes from 1 to 2"),
    ("mha_batch_prefill_func", but("max_seqlen_k", lambda n: 4), "max_seqlen too low"),
    ("mha_batch_prefill_func", but("cu_seqlens_q", put(2, 4)), "cu_seqlens_q ends at 4; expected 5"),
    ("mha_batch_prefill_func", but("causal", lambda x: False), "not causal"),
    ("mha_batch_prefill_func", but("q", lambda x: x[..., :64]), "batch_prefill: head_dim 64"),
    ("flash_attn_varlen_func", but("v", lambda x: x[:-1]), "expected (7, 4, 192)"),
    ("concat_and_cache_mla", but("slot_mapping", lambda x: x.int()), "slot_mapping is torch.int32"),
    ("concat_and_cache_mla", but("slot_mapping", put(0, 16)), "slot_mapping goes from 4 to 16"),
    ("get_mla_metadata_v1", but("work_info_set", lambda x: x[:-1]), "work_info_set has shape"),
    ("get_mla_metadata_v1", lambda g: {**g, "work_info_set": g["work_indptr"], "work_indptr": g["work_info_set"]},
     "work_indptr has shape"),
    ("get_mla_metadata_info_v1", but("num_head_qo", lambda n: 12), "12 heads; expected a multiple of 8"),
    ("mla_decode_fwd", but("q", lambda x: x[:, :8].contiguous()), "o has shape"),
    ("mla_decode_fwd", but("work_meta_data", torch.clone), "work_meta_data was not made for this batch"),
    ("mla_decode_fwd", but("max_seqlen_q", lambda n: 2), "max_seqlen_q is 2"),
    ("topk_softmax", but("gating_output", put(0, float("nan"))), "NaN among the logits"),
    ("topk_softmax", but("topk_indices", wider), "topk_ids is torch.int64"),
    ("biased_grouped_topk", but("correction_bias", torch.Tensor.bfloat16), "correction_bias is torch.bfloat16"),
    ("biased_grouped_topk", but("need_renorm", lambda x: False), "forgets the factor"),
    ("biased_grouped_topk", but("num_expert_group", lambda n: 16), "num_expert_group is 16"),
    ("grouped_topk", lambda g: g, "takes its arguments by position"),
    ("shuffle_weight", but("x", lambda x: x[:, :, :24]), "expected multiples of 16 and 32"),
    ("fused_moe", but("w1", torch.clone), "lost its mark is_shuffled"),
    ("fused_moe", but("topk_ids", put(0, 16)), "topk_ids goes from"),
    ("fused_moe", but("topk_weight", torch.Tensor.bfloat16), "topk_weight is torch.bfloat16"),
    ("per_group_quant_hip", but("quant_dtype", lambda x: torch.int8), "quant_dtype is torch.int8"),
    ("per_group_quant_hip", but("quant_dtype", lambda x: torch.float8_e4m3fn), "gfx942 has torch.float8_e4m3fnuz"),
    ("gemm_a8w8_blockscale", but("w_scale", lambda x: x[:, :1]), "w_scale has shape"),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    made = Recorder()
    Calls(made).all()
    return made


def test_every_call_is_made(recorder: Recorder) -> None:
    assert recorder.given.keys() == CALLS.keys()


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(WRONG)])
def test_wrong_calls_are_refused(recorder: Recorder, name: str, change: Change, message: str) -> None:
    call = Simulator.function(recorder, PATHS[name])
    with pytest.raises(Refused) as error:
        call(**change(recorder.given[name]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("version", "arch", "served"),
    [
        ("0.1.10", "gfx942", (16, 32, 48, 64, 80, 96, 112, 128)),
        ("0.1.10", "gfx950", (16, 32, 48, 64, 80, 96, 112, 128)),
        ("0.1.20", "gfx942", (16, 32, 48, 64, 80, 96, 112, 128)),
        ("0.1.20", "gfx950", (16, 32, 64)),
    ],
)
def test_heads_are_padded_to_what_a_kernel_serves(version: str, arch: str, served: tuple[int, ...]) -> None:
    """What the adapter picks against the kernels that AITER lists, which the simulator looks up."""
    simulator = Simulator(arch, version)
    aiter = Aiter(simulator)
    for heads in range(1, 129):
        padded = aiter.mla_heads(heads)
        assert padded == min((n for n in served if n >= heads), default=None)
        if padded is not None:
            simulator._check_heads(padded)
    for heads in set(range(1, 200)) - set(served):
        with pytest.raises(Refused):
            simulator._check_heads(heads)


def test_heads_that_no_kernel_serves_are_named(caplog: pytest.LogCaptureFixture) -> None:
    aiter = Aiter(Simulator("gfx950", "0.1.20"))
    assert [served(aiter, heads) for heads in (12, 128, 128, 129)] == [True, False, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "AITER 0.1.20 has no kernel for MLA of 128 heads on gfx950: Triton's is used; AITER 0.1.10 has one",
        "AITER 0.1.20 has no kernel for MLA of 129 heads on gfx950: Triton's is used",
    ]


def test_what_is_not_written_is_nan() -> None:
    """Rows of no sequence, and partial sums."""
    calls = Calls(Recorder())
    work = calls.aiter.mla_work(calls.cu_one, calls.indptr, calls.ones, 16)
    keys = (calls.cu_one, calls.indptr, calls.slots, calls.ones)
    calls.aiter.mla_decode(calls.values(2, 16, 576), calls.values(16, 1, 1, 576), *keys, 0.1, work)
    recorder = calls.aiter.provider
    assert isinstance(recorder, Recorder)
    partial, lse = Simulator.function(recorder, PATHS["mla_decode_fwd"])(**recorder.given["mla_decode_fwd"])
    assert bool(partial.isnan().all())
    assert lse is None


@pytest.fixture(scope="module")
def real() -> Callable[..., Any]:
    """A function of AITER's own sources that needs torch alone, by file and name."""

    def function(path: str, name: str, **names: Any) -> Any:
        with ZipFile(os.environ["POLYRADIX_AMD_AITER"]) as wheel:
            body = ast.parse(wheel.read(path)).body
        (found,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
        scope = {"torch": torch, **names}
        exec(compile(ast.Module([found], []), path, "exec"), scope)
        return scope[name]

    return function


def test_the_shuffle_is_aiters(real: Callable[..., Any]) -> None:
    w = torch.randn(3, 64, 96).bfloat16()
    theirs = real("aiter/ops/shuffle.py", "shuffle_weight")(w, layout=(16, 16))
    mine = Aiter(Simulator("gfx942", "0.1.10")).shuffled(w)
    assert torch.equal(mine, theirs)
    assert theirs.is_shuffled
    assert not torch.equal(mine, w)
    assert not hasattr(mine.detach(), "is_shuffled"), "the mark was kept: shuffled() need not set it"


def test_the_biased_choice_is_aiters(real: Callable[..., Any]) -> None:
    dtypes = type("dtypes", (), {"fp32": torch.float32, "i32": torch.int32})
    theirs = real("aiter/ops/topk.py", "biased_grouped_topk_torch", dtypes=dtypes)
    logits, bias = torch.randn(64, 32), torch.randn(32) / 4
    weights, ids = theirs(logits, bias, 6, True, 8, 4)
    mine, mine_weights = Aiter(Simulator("gfx942", "0.1.10")).topk_biased(logits, bias, 6, (8, 4), 1.0)
    order, mine_order = ids.argsort(1), mine.argsort(1)
    assert torch.equal(ids.gather(1, order).int(), mine.gather(1, mine_order))
    torch.testing.assert_close(weights.gather(1, order), mine_weights.gather(1, mine_order))
