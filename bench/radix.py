"""Our prefix tree and SGLang's Python one on the same multi-turn conversations: operations a second, bytes per token.

Usage: python bench/radix.py [--conversations 10000] [--page-size 1 16] [--capacity 1000000]

SGLang comes from its wheel, fetched into a temporary folder (or `--wheel FILE`), and needs torch. Only its tree is run:
what else the wheel's modules import is replaced by classes that do nothing. Each tree is replayed in a process of its
own, twice: for time, with eviction above `--capacity` tokens, and for the process's memory, without.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyradix.cache.radix import RadixCache

REAL = {"radix_cache", "base_prefix_cache", "cache_init_params", "evict_policy"}
ACTIVE = 256  # conversations at once


def turns(conversations: int) -> Iterator[tuple[np.ndarray, int]]:
    """(prompt and answer int32, length of the prompt), in the order of arrival: 1 to 8 turns of about 60 tokens asked
    and 150 answered, after one of 50 system prompts of 100 to 1,500 tokens, the popular ones more often."""
    rng = np.random.default_rng(0)
    system = [rng.integers(0, 128_000, n).astype(np.int32) for n in rng.integers(100, 1500, 50)]
    active: list[tuple[np.ndarray, int]] = []
    while conversations or active:
        while conversations and len(active) < ACTIVE:
            active.append((system[min(int(rng.zipf(1.5)), 50) - 1], int(rng.integers(1, 9))))
            conversations -= 1
        at = int(rng.integers(len(active)))
        history, left = active[at]
        asked, answered = rng.lognormal((4, 5), 0.6).astype(int) + 1
        full = np.concatenate((history, rng.integers(0, 128_000, asked + answered).astype(np.int32)))
        active[at] = full, left - 1
        if left == 1:
            active.pop(at)
        yield full, len(history) + asked


class Ours:
    name = "polyradix"

    def __init__(self, page_size: int) -> None:
        self.size, self.tree, self.fresh = page_size, RadixCache(page_size), 1

    def key(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def value(self, tokens: np.ndarray, pages: list[int]) -> list[int]:
        more = len(tokens) // self.size - len(pages)
        self.fresh += more
        return pages + list(range(self.fresh - more, self.fresh))

    def match(self, key: np.ndarray) -> tuple[int, Any, Any]:
        found = self.tree.match(key)
        return found.length, found.node, found.pages

    def insert(self, key: np.ndarray, pages: list[int]) -> Any:
        return self.tree.insert(key[: len(pages) * self.size], pages)[0]

    def lock(self, node: Any) -> None:
        self.tree.lock(node)

    def unlock(self, node: Any) -> None:
        self.tree.unlock(node)

    def evict(self, tokens: int) -> None:
        self.tree.evict(-(-tokens // self.size))

    def tokens(self) -> int:
        return self.tree.cached_pages * self.size


class Theirs:
    name = "SGLang"

    def __init__(self, page_size: int) -> None:
        import torch

        radix_cache, base, evict_policy = (
            importlib.import_module(f"sglang.srt.mem_cache.{name}")
            for name in ("radix_cache", "base_prefix_cache", "evict_policy")
        )

        radix_cache.get_eviction_strategy = lambda *_: evict_policy.LRUStrategy()
        radix_cache.split_node_hash_value = lambda *_: (None, None)
        self.torch, self.base, self.radix, self.size = torch, base, radix_cache, page_size
        pool = types.SimpleNamespace(device="cpu", free_segment=lambda *_, **__: None)
        self.tree = radix_cache.RadixCache.create_simulated(page_size=page_size, mock_allocator=pool)
        self.tree.update_eviction_metrics = lambda *_: None

    def key(self, tokens: np.ndarray) -> Any:
        return array("q", tokens.astype(np.int64).tobytes())

    def value(self, tokens: np.ndarray, _: Any) -> Any:
        return self.torch.arange(len(tokens))

    def match(self, key: Any) -> tuple[int, Any, Any]:
        found = self.tree.match_prefix(self.base.MatchPrefixParams(key=self.radix.RadixKey(key)))
        return found.device_prefix_len, found.last_device_node, self.tree.path_device_indices(found.last_device_node)

    def insert(self, key: Any, value: Any) -> Any:
        return self.tree.insert(self.base.InsertParams(key=self.radix.RadixKey(key), value=value)).last_device_node

    def lock(self, node: Any) -> None:
        self.tree.inc_lock_ref(node)

    def unlock(self, node: Any) -> None:
        self.tree.dec_lock_ref(node)

    def evict(self, tokens: int) -> None:
        self.tree.evict(self.base.EvictParams(num_tokens=tokens))

    def tokens(self) -> int:
        return int(self.tree.evictable_size() + self.tree.protected_size())


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds in `folder` the modules that are run; every other one of SGLang has nothing but classes of no-ops."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "sglang" or name.rpartition(".")[2] in REAL:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: Nothing  # type: ignore[method-assign]
        module.__path__ = [str(Path(self.folder, *spec.name.split(".")))]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Nothing:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    pass


def replay(tree: Ours | Theirs, conversations: int, capacity: int) -> tuple[Counter[str], int, int]:
    """Seconds by kind of operation, the number of turns, and the tokens found."""
    seconds: Counter[str] = Counter()
    clock, count, hits = time.perf_counter, 0, 0
    for full, asked in turns(conversations):
        prompt, sequence = tree.key(full[:asked]), tree.key(full[:-1])
        begin = clock()
        length, node, held = tree.match(prompt)
        matched = clock()
        tree.lock(node)
        locked = clock()
        value, rest = tree.value(full[:asked], held), tree.value(full[:-1], [])
        if isinstance(rest, list):
            rest = value + rest[len(value) :]
        inserting = clock()
        after = tree.insert(prompt, value)
        inserted = clock()
        tree.lock(after)
        tree.unlock(node)
        relocked = clock()
        tree.insert(sequence, rest)
        again = clock()
        tree.unlock(after)
        ended = clock()
        if (over := tree.tokens() - capacity) > 0:
            tree.evict(over)
        seconds["match"] += matched - begin
        seconds["insert"] += inserted - inserting + again - relocked
        seconds["lock"] += locked - matched + relocked - inserted + ended - again
        seconds["evict"] += clock() - ended
        count, hits = count + 1, hits + length
    return seconds, count, hits


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def child(which: str, folder: str, page_size: int, conversations: int, capacity: int) -> None:
    """Prints the figures of one tree as JSON."""
    if which == "theirs":
        sys.meta_path.insert(0, Stubs(folder))
    make = Theirs if which == "theirs" else Ours
    warm, tree = make(page_size), make(page_size)
    replay(warm, 10, 10**9)
    before = _resident()
    seconds, count, hits = replay(tree, conversations, capacity)
    grown = (_resident() - before) / tree.tokens()
    print(json.dumps({"seconds": seconds, "turns": count, "hits": hits, "bytes": grown, "tokens": tree.tokens()}))


def unpack(wheel: str | None, folder: Path) -> str:
    """The wheel's version; its Python files are in the folder afterwards."""
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "sglang"]
        subprocess.run([*pip, "-d", str(folder)], check=True)
    path = Path(wheel) if wheel else next(folder.glob("sglang-*.whl"))
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.rpartition("/")[2].removesuffix(".py") in REAL]
        archive.extractall(folder, [n for n in names if n.startswith("sglang/srt/mem_cache/")])
    return path.name.split("-")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--capacity", type=int, default=1_000_000, help="tokens the tree may hold in the timed run")
    parser.add_argument("--wheel", help="an SGLang wheel; fetched if not given")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child, args.page_size[0], args.conversations, args.capacity)
    with tempfile.TemporaryDirectory() as folder:
        version = unpack(args.wheel, Path(folder))
        for size in args.page_size:
            for which, name in (("ours", "polyradix"), ("theirs", f"SGLang {version}")):
                timed, whole = (_run(which, size, args.conversations, c, folder) for c in (args.capacity, 10**12))
                rates = ", ".join(f"{kind} {s / timed['turns'] * 1e6:.1f}" for kind, s in timed["seconds"].items())
                rate = 3 * timed["turns"] / (timed["seconds"]["match"] + timed["seconds"]["insert"])
                print(
                    f"page size {size:2}, {name:14}: {rate:8,.0f} match and insert a second; us a turn: {rates}; "
                    f"{whole['bytes']:.1f} bytes per token of {whole['tokens']:,}; {timed['hits']:,} tokens found"
                )


def _run(which: str, size: int, conversations: int, capacity: int, folder: str) -> Any:
    command = [sys.executable, __file__, "--child", which, folder, "--page-size", str(size)]
    command += ["--conversations", str(conversations), "--capacity", str(capacity)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
