"""How a checkpoint is quantised, as its config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polyradix.graph.config import Config

METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "mxfp4")
_FIELD = "quantization_config"


@dataclass(frozen=True)
class Quantisation:
    """`block`: rows and columns of FP8 that share a scale, None where the scale's shape says. `group`: columns of int4
    that share one, None for all. `offset`: what zero points are stored without."""

    method: Literal["fp8", "awq", "gptq", "packed", "mxfp4"]
    block: tuple[int, int] | None = None
    group: int | None = None
    offset: int = 0


def read_quantisation(c: Config) -> Quantisation | None:
    """Raises ModelError naming the field, its value and what was expected."""
    q = c.part(_FIELD)
    if not q.values:
        return None
    match q.values.get("quant_method"):
        case "fp8":
            return _fp8(q)
        case "compressed-tensors":
            return _compressed(q)
        case "awq":
            _only(q, bits=(4,), version=("gemm",), zero_point=(True,))
            return Quantisation("awq", group=_group(q))
        case "gptq":
            _only(q, bits=(4,), checkpoint_format=(None, "gptq", "gptq_v2"), dynamic=(None, {}))
            return Quantisation("gptq", group=_group(q), offset=int(q.values.get("checkpoint_format") != "gptq_v2"))
        case "mxfp4":
            return Quantisation("mxfp4")
    raise q.wrong("quant_method", f"one of {', '.join(METHODS)}")


def _fp8(q: Config) -> Quantisation:
    _only(q, fmt=(None, "e4m3", "float8_e4m3fn"), activation_scheme=(None, "dynamic", "static"))
    return Quantisation("fp8", _block(q, "weight_block_size"))


def _compressed(q: Config) -> Quantisation:
    """Of compressed-tensors, 8-bit floats and packed int4: https://github.com/vllm-project/compressed-tensors."""
    _only(q, format=(None, "float-quantized", "naive-quantized", "pack-quantized"))
    groups, one = q.part("config_groups"), _packed if q.values.get("format") == "pack-quantized" else _floats
    found = {one(groups.part(name).part("weights")) for name in groups.values}
    if len(found) != 1:
        raise q.wrong("config_groups", "groups of weights in one format")
    return found.pop()


def _floats(w: Config) -> Quantisation:
    _only(w, type=("float",), num_bits=(8,), strategy=("tensor", "channel", "block"), symmetric=(None, True))
    return Quantisation("fp8", _block(w, "block_structure") if w.values["strategy"] == "block" else None)


def _packed(w: Config) -> Quantisation:
    _only(w, type=("int",), num_bits=(4,), strategy=("group", "channel"))
    return Quantisation("packed", group=_group(w) if w.values["strategy"] == "group" else None)


def _only(c: Config, **expected: tuple[Any, ...]) -> None:
    for name, values in expected.items():
        found = c.values.get(name)
        if (found.lower() if isinstance(found, str) else found) not in values:
            raise c.wrong(name, " or ".join(repr(v) for v in values if v is not None))


def _block(c: Config, name: str) -> tuple[int, int] | None:
    value = c.values.get(name)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
        raise c.wrong(name, "[rows, columns]")
    return value[0], value[1]


def _group(q: Config) -> int | None:
    return None if q.values.get("group_size") == -1 else q.count("group_size")
