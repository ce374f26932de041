"""Tiny dense models with seeded weights in memory, and what greedy decoding of them must give, by the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from polyradix.backend.protocol import Backend, Heads, HostArray, ParamPart, Params, ParamSpec
from polyradix.graph.dense import param_specs
from polyradix.graph.rope import Rope
from polyradix.graph.spec import ModelSpec
from polyradix_conformance import oracle
from polyradix_conformance.inputs import values
from polyradix_conformance.oracle import EXACT, HOST, Arr, Attention, Precision
from polyradix_conformance.tolerance import floor

STEPS = 5
LENGTHS = (5, 9)  # of the prompts
PLAIN = ModelSpec("LlamaForCausalLM", 2, 128, 192, Heads(8, 4, 64), 27, 64, 1e-5, Rope(10000.0))
BIASED = ModelSpec(
    "Qwen3ForCausalLM", 2, 128, 192, Heads(8, 4, 64), 27, 64, 1e-5, Rope(10000.0), True, True, True, qk_norm=True
)
MODELS = {"plain": PLAIN, "biased": BIASED}
SEEDS = {"plain": 4, "biased": 56}  # chosen so that no token is decided by rounding

Values = dict[str, dict[str, Arr]]  # by parameter, then "weight" or "bias"


@dataclass(frozen=True)
class Decoding:
    """By step: tokens [steps,S], logits [steps,S,V], floors [steps,S]: of a sequence always its largest."""

    prompts: list[Arr]
    tokens: Arr
    logits: Arr
    floors: Arr


@cache
def weights(name: str, dtype: str) -> tuple[Values, list[Values]]:
    """Of the top and of each layer, as float64 numbers of `dtype`."""
    table = param_specs(MODELS[name], dtype)  # type: ignore[arg-type]
    layers = [{p.name: _values(name, f"layer {i}", p) for p in layer} for i, layer in enumerate(table.layers)]
    return {p.name: _values(name, "top", p) for p in table.top}, layers


def _values(model: str, where: str, p: ParamSpec) -> dict[str, Arr]:
    if p.kind == "rope":
        angles = np.arange(p.shape[0])[:, None] * 10000.0 ** (-np.arange(0, 1, 2 / p.shape[1]))
        return {"weight": oracle.rounded(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "float32")}
    seed = f"{model} {SEEDS[model]} {where} {p.name}"
    x, bias = values(seed, p.shape, p.dtype), values(f"{seed} bias", p.shape[:1], p.dtype) / 4
    if p.kind == "norm":
        x = 1 + x / 8
    elif p.kind != "embed":
        x = x / np.sqrt(p.shape[1])
    return {"weight": oracle.rounded(x, p.dtype)} | ({"bias": bias} if p.bias else {})


def packed(name: str, dtype: str, backend: Backend) -> Params:
    table, (top, layers) = param_specs(MODELS[name], dtype), weights(name, dtype)  # type: ignore[arg-type]

    def pack(p: ParamSpec, held: Values) -> Any:
        def read(part: ParamPart = "weight") -> HostArray:
            out: HostArray = held[p.name][part].astype(HOST[p.dtype])
            return out

        return backend.pack(p, read)

    each = [{p.name: pack(p, held) for p in specs} for specs, held in zip(table.layers, layers, strict=True)]
    return Params({p.name: pack(p, top) for p in table.top}, each)


def logits(p: Precision, name: str, dtype: str, tokens: Arr) -> Arr:
    """[T,V] of one sequence, in float32 or wider."""
    spec, (top, layers) = MODELS[name], weights(name, dtype)
    heads, attention = spec.heads, Attention(spec.heads.dim**-0.5)

    def linear(x: Arr, w: dict[str, Arr]) -> Arr:
        return oracle.linear(p, x, w["weight"], w.get("bias"))

    def norm(x: Arr, w: dict[str, Arr]) -> Arr:
        return oracle.rms_norm(p, x, w["weight"], spec.rms_eps)

    h = top["embed"]["weight"][tokens]
    x = norm(h, top["first_norm"])
    for w in layers:
        rows = linear(x, w["qkv"]).reshape(len(x), -1, heads.dim)
        q, k, v = np.split(rows, [heads.q, heads.q + heads.kv], axis=1)
        if spec.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        q, k = (oracle.rope(p, y, top["rope"]["weight"], np.arange(len(x))) for y in (q, k))
        h = oracle.add(p, h, linear(oracle.attend(p, q, k, v, attention).reshape(len(x), -1), w["o"]))
        g = oracle.gated(p, linear(norm(h, w["mlp_norm"]), w["gate_up"]))
        h = oracle.add(p, h, linear(g, w["down"]))
        x = norm(h, w["next_norm"])
    return oracle.linear(p, x, top["logits"]["weight"], final=True)


@cache
def decoding(name: str, dtype: str) -> Decoding:
    prompts = [np.random.default_rng(n).integers(0, MODELS[name].vocab, n) for n in LENGTHS]
    tokens, truths, floors = [], [], []
    for prompt in prompts:
        seq = prompt
        for _ in range(STEPS):
            truth = logits(EXACT, name, dtype, seq)
            seq = np.append(seq, truth[-1].argmax())
        new = slice(len(prompt) - 1, None)
        others = [logits(p, name, dtype, seq[:-1])[new] for p in oracle.emulated(dtype)]
        tokens.append(seq[len(prompt) :])
        truths.append(truth[new])
        floors.append(np.full(STEPS, floor(truth[new], others, "float32").max()))
    return Decoding(prompts, np.stack(tokens, 1), np.stack(truths, 1), np.stack(floors, 1))
