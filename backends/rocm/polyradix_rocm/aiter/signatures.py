"""What AITER's functions take, read from its sources: importing it needs ROCm, and builds kernels.

python -m polyradix_rocm.aiter.signatures FOLDER    prints those of NAMES as JSON, FOLDER being where `aiter/` is.
The files beside this one were made so from AITER's tags v0.1.10.post3 and v0.1.20.post1 and from PyPI's wheel
0.1.7.post2.dev18.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

NAMES = (  # module and function, in the order of calls.py
    "aiter.ops.rmsnorm.rmsnorm2d_fwd",
    "aiter.ops.rmsnorm.rmsnorm2d_fwd_with_add",
    "aiter.ops.rope.rope_cached_positions_2c_fwd",
    "aiter.ops.attention.paged_attention_ragged",
    "aiter.ops.mha.mha_batch_prefill_func",
    "aiter.ops.mha.flash_attn_varlen_func",
    "aiter.ops.cache.concat_and_cache_mla",
    "aiter.ops.attention.get_mla_metadata_info_v1",
    "aiter.ops.attention.get_mla_metadata_v1",
    "aiter.mla.mla_decode_fwd",
    "aiter.ops.moe_op.topk_softmax",
    "aiter.ops.topk.grouped_topk",
    "aiter.ops.topk.biased_grouped_topk",
    "aiter.ops.shuffle.shuffle_weight",
    "aiter.fused_moe.fused_moe",
    "aiter.ops.quant.per_group_quant_hip",
    "aiter.ops.gemm_op_a8w8.gemm_a8w8_blockscale",
)
Signatures = Mapping[str, inspect.Signature]
Read = Callable[[str], str]  # the text of a source file, given its path below the folder of `aiter/`


def parsed(source: str, name: str) -> inspect.Signature | None:
    """Of the top-level function `name`, annotations and values of defaults left out."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = node.args.posonlyargs + node.args.args
            optional = len(given) - len(node.args.defaults)
            kinds = [(a.arg, n >= optional) for n, a in enumerate(given)]
            return inspect.Signature([_parameter(n, o) for n, o in kinds])
    return None


def _parameter(name: str, optional: bool) -> inspect.Parameter:
    default = None if optional else inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)


def read_all(read: Read) -> dict[str, inspect.Signature]:
    """Those of NAMES that the sources have."""
    out = {}
    for name in NAMES:
        module, _, function = name.rpartition(".")
        try:
            found = parsed(read(module.replace(".", "/") + ".py"), function)
        except (OSError, KeyError, SyntaxError):
            continue
        if found:
            out[name] = found
    return out


@cache
def recorded(version: str) -> Signatures:
    """Of a version that this backend was written for, for example 0.1.20."""
    table = json.loads(files(__package__).joinpath(f"signatures/{version}.json").read_text())
    return {name: _signature(text) for name, text in table.items()}


def _signature(text: str) -> inspect.Signature:
    found = parsed(f"def f({text}): ...", "f")
    assert found is not None
    return found


def text(signature: inspect.Signature) -> str:
    """As the files have it: names, and `=None` where there is a default."""
    return ", ".join(p.name if p.default is p.empty else f"{p.name}=None" for p in signature.parameters.values())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    made = read_all(lambda path: (root / path).read_text())
    print(json.dumps({name: text(s) for name, s in made.items()}, indent=1))
