"""Whole models, emulated, decode what the CPU backend decodes, and what runs over AITER is what should."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole import MODELS, TOKENS, answers, core, follow, prompts

from polyradix.backend.registry import open_backend
from polyradix_rocm.backend import CpuBackend
from polyradix_rocm.simulator import Simulator

BOUND = 0.05  # of log-probabilities, in bfloat16
NORMS = {"rmsnorm2d_fwd", "rmsnorm2d_fwd_with_add", "rope_cached_positions_2c_fwd"}
EXPERTS = {"shuffle_weight", "fused_moe"}
WORK = {"get_mla_metadata_info_v1", "get_mla_metadata_v1"}
MLA = WORK | {"concat_and_cache_mla", "mla_decode_fwd", "flash_attn_varlen_func"}
PAGED = {"paged_attention_ragged", "mha_batch_prefill_func"}
CALLED = {
    "llama": NORMS | PAGED,
    "qwen3-moe": NORMS | PAGED | EXPERTS | {"topk_softmax"},
    "deepseek-v3": NORMS | MLA | EXPERTS | {"biased_grouped_topk"},
    "deepseek-v2": NORMS | MLA | EXPERTS | {"grouped_topk"},
}


def run(name: str, arch: str, version: str, folder: Path) -> tuple[float, set[str]]:
    """The share of tokens that are the CPU backend's, and the calls that were made."""
    config = MODELS[name]
    asked = [(prompt, TOKENS) for prompt in prompts(config["vocab_size"])]
    reference = answers(core(open_backend("cpu", kernels="torch"), config, folder), asked)
    backend = open_backend("rocm", emulate=True, simulate=arch, aiter=version, platform="cpu")
    share = follow(core(backend, config, folder), reference, BOUND)
    assert isinstance(backend, CpuBackend)
    assert backend._verbs is not None
    simulator = backend._verbs.aiter.provider
    assert isinstance(simulator, Simulator)
    return share, set(simulator.calls)


@pytest.mark.parametrize(("name", "arch", "version"), [
    ("llama", "gfx942", "0.1.20"), ("qwen3-moe", "gfx950", "0.1.10"),
    ("deepseek-v3", "gfx942", "0.1.10"), ("deepseek-v2", "gfx950", "0.1.20"),
])  # fmt: skip
def test_greedy_tokens(name: str, arch: str, version: str, tmp_path: Path) -> None:
    share, calls = run(name, arch, version, tmp_path)
    assert share > 0.9
    assert calls == CALLED[name]


def test_without_fused_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRADIX_EXPAND", "all")
    share, calls = run("llama", "gfx942", "0.1.20", tmp_path)
    assert share > 0.9
    assert calls == CALLED["llama"] - {"rmsnorm2d_fwd_with_add"}
