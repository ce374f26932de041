"""NumPy ranks as threads: the collectives, what happens when ranks go wrong, and a whole engine over several ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy import entry
from polyradix.backend.numpy.mesh import NumpyCollectives, Ranks
from polyradix.backend.protocol import KVSpec, ParamSpec
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.schedule.params import SamplingParams

SIZE = 4


@pytest.fixture(scope="module")
def talk() -> NumpyCollectives:
    return NumpyCollectives(Ranks(SIZE))


def own(rank: int, dtype: Any = np.float32) -> Any:
    """[2,4,8], different on every rank."""
    return np.random.default_rng(rank).normal(size=(2, 4, 8)).astype(dtype)


ALL = [own(r) for r in range(SIZE)]
TOTAL = ((ALL[0] + ALL[1]) + ALL[2]) + ALL[3]


@pytest.mark.parametrize("axis", [1, 2])
def test_verbs(talk: NumpyCollectives, axis: int) -> None:
    def parts(x: Any) -> list[Any]:
        return np.split(x, SIZE, axis)

    swapped = [np.concatenate([parts(x)[r] for x in ALL], axis) for r in range(SIZE)]
    check(talk, "all_reduce", [], [TOTAL] * SIZE)
    check(talk, "all_gather", [axis], [np.concatenate(ALL, axis)] * SIZE)
    check(talk, "reduce_scatter", [axis], parts(TOTAL))
    check(talk, "all_to_all", [axis], swapped)
    check(talk, "broadcast", [2], [ALL[2]] * SIZE)
    check(talk, "permute", [[2, 0, 3, 1]], [ALL[1], ALL[3], ALL[0], ALL[2]])


def check(talk: NumpyCollectives, verb: str, args: list[Any], want: list[Any]) -> None:
    got = talk.ranks.run(lambda rank: getattr(talk, verb)(own(rank), *args))
    np.testing.assert_array_equal(got, want)


def test_a_sum_of_bfloat16_is_rounded_once(talk: NumpyCollectives) -> None:
    got = talk.ranks.run(lambda rank: talk.all_reduce(own(rank, ml_dtypes.bfloat16)))
    want = sum(own(r, ml_dtypes.bfloat16).astype(np.float32) for r in range(SIZE)).astype(ml_dtypes.bfloat16)
    assert all(x.dtype == want.dtype and (x == want).all() for x in got)


def test_nobody_passes_a_barrier_before_all_are_there(talk: NumpyCollectives) -> None:
    passed: list[int] = []

    def step(rank: int) -> None:
        if rank == 3:
            time.sleep(0.1)
            assert passed == []
        talk.barrier()
        passed.append(rank)

    talk.ranks.run(step)
    assert sorted(passed) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", range(SIZE))
def test_a_rank_that_raises_stops_the_others_and_its_error_comes_out(talk: NumpyCollectives, bad: int) -> None:
    def step(rank: int) -> Any:
        talk.barrier()
        if rank == bad:
            raise KeyError(f"rank {rank}")
        return talk.all_reduce(own(rank))

    with pytest.raises(KeyError, match=f"rank {bad}"):
        talk.ranks.run(step)
    assert talk.ranks.run(lambda rank: talk.ranks.rank) == [0, 1, 2, 3]  # and the next step is a new beginning


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            lambda talk: None,
            r"ranks disagree: 0: all_reduce of float32 \(2, 4, 8\); 1: end of the step; 2:",
        ),
        (lambda talk: talk.all_gather(own(1), 0), "1: all_gather 0 of"),
        (lambda talk: talk.all_reduce(own(1)[:1]), r"1: all_reduce of float32 \(1, 4, 8\)"),
        (
            lambda talk: talk.permute(own(1), [0, 0, 1, 2]),
            r"permute to \[0, 0, 1, 2\]; expected each rank from 0 to 3",
        ),
    ],
    ids=["one ends early", "another verb", "another shape", "not a permutation"],
)
def test_ranks_that_disagree_are_told_instead_of_hanging(talk: NumpyCollectives, odd: Any, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        talk.ranks.run(lambda rank: odd(talk) if rank == 1 else talk.all_reduce(own(rank)))


def test_collectives_belong_into_a_step(talk: NumpyCollectives) -> None:
    with pytest.raises(RuntimeError, match="inside a step"):
        talk.barrier()


def never(part: str = "weight") -> Any:
    raise AssertionError("a weight was read")


def test_what_cannot_be_split_is_refused_before_it_is_read() -> None:
    backend = entry.create(tp=4)
    for spec, message in (
        (ParamSpec("qkv", "linear", (16, 8), "float32", (8, 4, 4), 0), None),
        (ParamSpec("qkv", "linear", (12, 8), "float32", (8, 2, 2), 0), r"parameter qkv: segments has 2; .* tp \(4\)"),
        (ParamSpec("up", "linear", (6, 8), "float32", (), 0), r"parameter up: shape\[0\] has 6"),
        (ParamSpec("o", "linear_reduce", (8, 6), "float32", (), 1), r"parameter o: shape\[1\] has 6"),
        (ParamSpec("o", "linear_reduce", (8, 8), "float32", (), 0), "shard_axis is 0; linear_reduce takes 1 or None"),
        (ParamSpec("n", "norm", (8,), "float32", (), 0), "shard_axis is 0; norm takes None"),
    ):
        with pytest.raises(ValueError if message else AssertionError, match=message or "a weight was read"):
            backend.pack(spec, never)
    with pytest.raises(ValueError, match=r"kv_heads is 2; expected a multiple of tp \(4\)"):
        backend.alloc_kv(KVSpec(1, 2, 8, 16, "float32"), 4)
    kv = backend.alloc_kv(KVSpec(1, 4, 8, 16, "float32"), 4)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 1, 16, 3, 8\); expected \(2, 1, 1, 16, 4, 8\)"):
        backend.import_pages(kv, [1], np.zeros((2, 1, 1, 16, 3, 8), np.float32))


def test_number_of_ranks() -> None:
    assert [entry.create(tp=n).collectives.size for n in (1, 2, 8)] == [1, 2, 8]
    with pytest.raises(Unsupported, match="tp 9"):
        entry.create(tp=9)
    with pytest.raises(ValueError, match="tp is 0"):
        entry.create(tp=0)


def test_memory_and_pages_are_of_one_rank() -> None:
    one, four = entry.create(), entry.create(tp=4)
    assert four.memory().total == one.memory().total // 4
    spec = KVSpec(3, 4, 8, 16, "bfloat16")
    assert four.kv_page_bytes(spec) * 4 == one.kv_page_bytes(spec)


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "attention_bias": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(tp: int = 1, overlapped: bool = False, **config: Any) -> EngineCore:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | config))
        return EngineCore(
            EngineConfig(
                model=str(path),
                device="numpy",
                tp=tp,
                load_format="dummy",
                progress=False,
                kv_pages=16,
                page_size=4,
                max_tokens_per_step=24,
                backend_options={"async_launch": overlapped},
            )
        )

    return make


def generated(core: EngineCore) -> dict[str, list[int]]:
    """The tokens of three requests that share a prefix, with too few pages for all: chunks, hits and retractions."""
    rng = np.random.default_rng(2)
    head, out = rng.integers(1, 97, 9), {f"r{i}": [] for i in range(3)}  # type: ignore[var-annotated]
    for i, rid in enumerate(out):
        prompt = np.concatenate((head, rng.integers(1, 97, 3 + 9 * i))).astype(np.int32)
        core.submit(rid, prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    while core.has_work:
        for chunk in core.step():
            assert not chunk.error
            out[chunk.rid] += chunk.tokens
    return out


@pytest.mark.parametrize(("tp", "overlapped"), [(2, False), (4, True)])
def test_an_engine_over_ranks_gives_the_tokens_of_one(make: Any, tp: int, overlapped: bool) -> None:
    core = make(tp, overlapped)
    assert core.info()["tp"] == tp
    got = generated(core)
    assert got == generated(make())
    assert {len(tokens) for tokens in got.values()} == {8}
    assert len({t for tokens in got.values() for t in tokens}) > 3


def test_ranks_that_the_model_or_the_device_has_not(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"tp is 4; expected a divisor of the model's num_key_value_heads \(2\)"):
        make(4, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"tp is 4; expected a divisor of the model's intermediate_size \(50\)"):
        make(4, intermediate_size=50)
    with pytest.raises(Unsupported, match="tp 64"):
        make(64)
    with pytest.raises(ConfigError, match="tp is 0"):
        make(0)


def test_a_step_that_fails_on_one_rank_fails_alone(make: Any) -> None:
    core = make(2)
    real = core.backend.ops.attend

    def fails(*args: Any) -> Any:
        if core.backend.ranks.rank == 1:
            core.backend.ops.attend = real
            raise RuntimeError("rank 1 is gone")
        return real(*args)

    core.backend.ops.attend = fails
    core.submit("lost", np.arange(1, 9, dtype=np.int32), SamplingParams(max_tokens=3))
    chunk = core.step()[-1]
    assert (chunk.finish, chunk.error) == ("error", "RuntimeError: rank 1 is gone")
    core.submit("next", np.arange(1, 9, dtype=np.int32), SamplingParams(max_tokens=3, ignore_eos=True))
    while core.has_work:
        last = core.step()[-1:]
    assert last[0].finish == "length"
