"""Our calls against the schemas of two releases of the vendor's wheel: every name and number of arguments is theirs."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch_npu

from polyradix_npu import attention, calls, latent

SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
ATB = "torch_npu/lib/libop_plugin_atb.so"
OLDER = sorted(Path(sys.prefix, "older").glob("torch_npu-*.whl"))
WRAPPER = calls.attend.__name__  # passes keywords on


@cache
def schemas(release: str) -> str:
    """The functions of torch_npu, and ATB's, which are in a library."""
    if release == "installed":
        atb = str(torch.ops.atb._npu_paged_attention.default._schema).removeprefix("atb::")
        return (Path(torch_npu.__file__).parents[1] / SCHEMAS).read_text() + f"func: {atb}"
    with zipfile.ZipFile(OLDER[-1]) as wheel:
        (found,) = re.findall(rb"_npu_paged_attention\([^\0]*\) -> \(\)", wheel.read(ATB))
        return wheel.read(SCHEMAS).decode() + f"func: {found.decode()}"


def arguments(text: str, op: str) -> tuple[list[str], list[str]]:
    """Names of those that may be given by position, and of those by keyword alone."""
    found = re.search(rf"func: {op}\((.*?)\) ->", text)
    assert found, f"{op} is not in the wheel"
    position, _, keyword = found[1].partition("*, ")
    return _names(position), _names(keyword)


def _names(parameters: str) -> list[str]:
    return [part.split()[-1].split("=")[0] for part in parameters.split(", ") if part.strip(", ")]


def named(module: object) -> Iterator[ast.Call]:
    tree = ast.parse(Path(module.__file__).read_text())  # type: ignore[attr-defined]
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def ours() -> Iterator[tuple[str, int, list[str]]]:
    """Ops called in calls.py, with how many positions and which keywords; a starred pair counts as two."""
    for node in named(calls):
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch_npu":
            positions = sum(2 if isinstance(a, ast.Starred) else 1 for a in node.args)
            yield node.func.attr, positions, [k.arg for k in node.keywords if k.arg]


@pytest.mark.parametrize("release", ["installed", "older"])
@pytest.mark.parametrize(("op", "positions", "keywords"), list(ours()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_call_fits_the_schema(release: str, op: str, positions: int, keywords: list[str]) -> None:
    place, keyword = arguments(schemas(release), op)
    assert positions <= len(place)
    assert set(keywords) <= {*place[positions:], *keyword}


@pytest.mark.parametrize("release", ["installed", "older"])
def test_keywords_passed_on_to_attention_are_in_the_schema(release: str) -> None:
    text = "\n".join(Path(m.__file__).read_text() for m in (attention, latent))
    used = set(re.findall(r'"(\w+)"(?:: |\] =)', text)) | {
        k.arg
        for m in (attention, latent)
        for node in named(m)
        if getattr(node.func, "attr", "") == WRAPPER
        for k in node.keywords
        if k.arg and k.arg not in inspect.signature(calls.attend).parameters
    }
    assert {"block_table", "actual_seq_kvlen", "sparse_mode", "query_rope", "learnable_sink"} <= used
    assert used <= set(arguments(schemas(release), "npu_fused_infer_attention_score_v2")[1])


def test_the_older_wheel_updates_captured_attention_too() -> None:
    with zipfile.ZipFile(OLDER[-1]) as wheel:
        graphs = wheel.read("torch_npu/npu/graphs.py").decode()
        handlers = "".join(wheel.read(n).decode() for n in wheel.namelist() if "npugraph_handler" in n and ".py" in n)
    assert "def update(self, cpu_update_input)" in graphs
    assert "npu_fused_infer_attention_score_v2.out" in graphs + handlers
