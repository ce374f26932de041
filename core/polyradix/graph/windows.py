"""Which layers see the newest keys alone, from any spelling of a config."""

from __future__ import annotations

from polyradix.graph.config import Config

_EVERYWHERE = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
_SWITCHED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # by use_sliding_window
_PATTERNS = {
    "Gemma2ForCausalLM": 2,
    "Gemma3ForCausalLM": 6,
    "GptOssForCausalLM": 2,
}  # of so many layers the last has none
_WINDOWS = {
    **dict.fromkeys(("MistralForCausalLM", *_SWITCHED, "Gemma2ForCausalLM", "Gemma3ForCausalLM"), 4096),
    "GptOssForCausalLM": 128,
}  # where a config does not say; null is none
_TYPES = ("sliding_attention", "full_attention")
_SPARE = 1 / 16  # of a model's layers, that groups which are not full may cost; fewer groups make smaller tables


def read_windows(c: Config, architecture: str, layers: int) -> tuple[int | None, frozenset[int]]:
    """How many keys a query sees, itself included, and in which layers."""
    usual = None if "sliding_window" in c.values else _WINDOWS.get(architecture)
    if architecture not in {*_EVERYWHERE, *_SWITCHED, *_PATTERNS}:
        return None, frozenset()
    if usual is None and c.values.get("sliding_window") is None:
        return None, frozenset()
    if architecture in _SWITCHED and not c.get("use_sliding_window", bool, False):
        return None, frozenset()
    window, some = usual or c.count("sliding_window"), _layers(c, architecture, layers)
    return (window, some) if some else (None, some)


def layer_groups(layers: int, windowed: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    """The layers in groups of one kind and, but for a kind's last, of one size, the full ones first; none if all are of
    one kind. As few groups as can be while their arrays are at most _SPARE more than the layers."""
    kinds = [i for i in range(layers) if i not in windowed], sorted(windowed)
    for size in range(min(map(len, kinds)), 0, -1):
        groups = tuple(tuple(kind[i : i + size]) for kind in kinds for i in range(0, len(kind), size))
        if len(groups) * size <= layers * (1 + _SPARE):
            return groups
    return ()


def _layers(c: Config, architecture: str, layers: int) -> frozenset[int]:
    if architecture in _EVERYWHERE:
        return frozenset(range(layers))
    if c.values.get("layer_types") is not None:
        return _typed(c, layers)
    if architecture in _PATTERNS:
        every = c.count("sliding_window_pattern", _PATTERNS[architecture])
        return frozenset(i for i in range(layers) if (i + 1) % every)
    return frozenset(range(c.at_least_0("max_window_layers", int, 28), layers))


def _typed(c: Config, layers: int) -> frozenset[int]:
    types = c.values["layer_types"]
    if not isinstance(types, list) or len(types) != layers or not all(t in _TYPES for t in types):
        raise c.wrong("layer_types", f"a list of {layers}, each {' or '.join(map(repr, _TYPES))}")
    return frozenset(i for i, t in enumerate(types) if t == _TYPES[0])
