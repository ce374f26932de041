"""What a model is, read from a Hugging Face config: numbers checked once. Reads no weights, knows no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polyradix.backend.capabilities import KV_FP8, Needs
from polyradix.backend.protocol import DType, Gate, Heads, KVDType, KVSpec, MoeSpec
from polyradix.graph import deepseek, gemma, gpt_oss
from polyradix.graph.config import MANY, MOST, Config
from polyradix.graph.errors import ModelError
from polyradix.graph.mla import Latent
from polyradix.graph.moe import Experts
from polyradix.graph.quantisation import read_quantisation
from polyradix.graph.rope import Rope, read_rope, scaling
from polyradix.graph.windows import read_windows

ARCHITECTURES = (
    *deepseek.ARCHITECTURES,
    *gemma.ARCHITECTURES,
    gpt_oss.ARCHITECTURE,
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_HEAD_DIMS = {
    "Qwen3ForCausalLM": 128,
    gpt_oss.ARCHITECTURE: gpt_oss.HEAD_DIM,
    **dict.fromkeys(gemma.ARCHITECTURES, gemma.HEAD_DIM),
}  # where none is given
_EPS = {"MixtralForCausalLM": 1e-5, gpt_oss.ARCHITECTURE: 1e-5}  # where none is given
_THETAS = {"MixtralForCausalLM": 1e6, gpt_oss.ARCHITECTURE: 150000.0}  # where none is given
_DTYPES: dict[str, DType] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: RMSNorm, rotary positions, grouped-query or latent attention, and a gated feed-forward or experts of
    it. `norm_offset` is what norms add to their weights, `post_norms` are of attention's and the feed-forward's results
    before these are added."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: Heads
    vocab: int
    max_position: int
    rms_eps: float
    rope: Rope
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    window: int | None = None  # keys a query sees, itself included, in the layers of `windowed`
    windowed: frozenset[int] = frozenset()
    local_rope: Rope | None = None  # of these layers, None: as the others
    attn_scale: float | None = None  # None: 1 / sqrt(heads.dim)
    softcap: float | None = None  # of attention's scores
    logits_softcap: float | None = None
    sinks: bool = False
    gate: Gate = "silu"
    embed_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False
    eos_ids: tuple[int, ...] = ()
    dtype: DType = "bfloat16"  # of the published weights; float16 becomes bfloat16
    experts: Experts | None = None
    latent: Latent | None = None  # heads.kv and heads.dim are then those of expanded keys

    @staticmethod
    def from_hf_config(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
        """Raises ModelError naming the field, its value and what was expected."""
        c = Config(config)
        architecture = _architecture(config)
        if architecture in deepseek.ARCHITECTURES:
            return _deepseek(c, architecture, eos_ids(config, generation_config or {}))
        q, hidden = c.count("num_attention_heads"), c.count("hidden_size")
        if c.values.get("head_dim") is None and architecture not in _HEAD_DIMS and hidden < q:
            raise c.wrong("hidden_size", f"at least num_attention_heads ({q}), or a head_dim")
        kv = c.count("num_key_value_heads", q)
        dim = c.count("head_dim", _HEAD_DIMS.get(architecture, hidden // q))
        if q % kv:
            raise c.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({q})")
        if dim % 2:
            raise c.wrong("head_dim", "an even number")
        _refuse_unknown_parts(c, architecture)
        qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture.startswith("Qwen3")
        attention_bias = c.get("attention_bias", bool, False)
        layers, max_position = c.count("num_hidden_layers", most=MANY), c.count("max_position_embeddings")
        rope = _rope(c, architecture, max_position, dim)
        window, windowed = read_windows(c, architecture, layers)
        spec = ModelSpec(
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            intermediate=c.count("intermediate_size"),
            heads=Heads(q, kv, dim),
            vocab=c.count("vocab_size"),
            max_position=rope.stretched(max_position),
            rms_eps=c.positive("rms_norm_eps", _EPS.get(architecture, 1e-6)),
            rope=rope,
            qkv_bias=qwen2 or attention_bias,
            o_bias=attention_bias and not qwen2,
            mlp_bias=c.get("mlp_bias", bool, False),
            qk_norm=qwen3,
            tie_embeddings=c.get("tie_word_embeddings", bool, False),
            window=window,
            windowed=windowed,
            eos_ids=eos_ids(config, generation_config or {}),
            dtype=_dtype(c),
            experts=_experts(c, architecture, layers),
        )
        if architecture == gpt_oss.ARCHITECTURE:
            return gpt_oss.gpt_oss(spec, c)
        return gemma.gemma(spec, c) if architecture in gemma.ARCHITECTURES else spec

    def kv_spec(self, page_size: int, dtype: KVDType, groups: tuple[tuple[int, ...], ...] = ()) -> KVSpec:
        """`groups` as of KVSpec."""
        if self.latent is not None:
            a = self.latent.attention
            index = self.latent.index.dim if self.latent.index else 0
            return KVSpec(self.layers, 1, a.rank + a.rope + index, page_size, dtype, "latent", index)
        return KVSpec(self.layers, self.heads.kv, self.heads.dim, page_size, dtype, groups=groups)

    def choose_dtype(self, asked: DType | Literal["auto"], offered: frozenset[str]) -> DType:
        """What was asked for; for `auto` the checkpoint's own dtype if the backend offers it, else float32."""
        if asked != "auto":
            return asked
        return self.dtype if self.dtype in offered else "float32"

    def needs(self, dtype: DType, kv_dtype: KVDType | None = None) -> Needs:
        wanted = {
            "bias": self.qkv_bias or self.o_bias or self.mlp_bias,
            "qk_norm": self.qk_norm,
            "window": self.window is not None,
            "softcap": self.softcap is not None or self.logits_softcap is not None,
            "gelu_tanh": self.gate == "gelu_tanh",
            "sinks": self.sinks,
            "moe_bias": self.experts is not None and self.experts.biased,
            "moe_clamp": self.experts is not None and self.experts.routing.limit is not None,
            "moe": self.experts is not None,
            "mla": self.latent is not None,
            KV_FP8[self.latent is not None]: kv_dtype == "float8_e4m3fn",
            "indexer": self.latent is not None and self.latent.index is not None,
        }
        return Needs(dtype, 0 if self.latent else self.heads.dim, frozenset(name for name, on in wanted.items() if on))

    def uneven_split(self, tp: int) -> str | None:
        """Why the model cannot be split over `tp` ranks, None when it can."""
        sizes = {"num_attention_heads" if self.latent else "num_key_value_heads": self.heads.kv}
        if self.experts is not None:
            sizes["num_experts"] = self.experts.routing.experts
            sizes["n_shared_experts * moe_intermediate_size"] = self.experts.shared
        if self.experts is None or self.experts.dense_layers:
            sizes["intermediate_size"] = self.intermediate
        for name, size in sizes.items():
            if size % tp:
                return f"tp is {tp}; expected a divisor of the model's {name} ({size})"
        return None


def _deepseek(c: Config, architecture: str, eos: tuple[int, ...]) -> ModelSpec:
    _refuse_unknown_parts(c, architecture)
    layers, max_position = c.count("num_hidden_layers", most=MANY), c.count("max_position_embeddings")
    latent, rope = deepseek.latent(c, architecture, max_position)
    a = latent.attention
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        hidden=c.count("hidden_size"),
        intermediate=c.count("intermediate_size"),
        heads=Heads(a.heads, a.heads, a.nope + a.rope),
        vocab=c.count("vocab_size"),
        max_position=rope.stretched(max_position),
        rms_eps=a.eps,
        rope=rope,
        o_bias=latent.bias,
        tie_embeddings=c.get("tie_word_embeddings", bool, False),
        eos_ids=eos,
        dtype=_dtype(c),
        experts=deepseek.experts(c, architecture, layers),
        latent=latent,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    if isinstance(found, list) and len(found) == 1 and found[0] in ARCHITECTURES:
        return str(found[0])
    raise ModelError(f"model config: architectures is {found!r}; expected one of {', '.join(ARCHITECTURES)}")


def _refuse_unknown_parts(c: Config, architecture: str) -> None:
    if architecture not in gemma.ARCHITECTURES and c.get("hidden_act", str, "silu") not in ("silu", "swish"):
        raise c.wrong("hidden_act", "'silu'")
    read_quantisation(c)


def _rope(c: Config, architecture: str, max_position: int, dim: int) -> Rope:
    if architecture == "Gemma3ForCausalLM":
        return gemma.rope(c, "full_attention", max_position, dim)
    if architecture == gpt_oss.ARCHITECTURE and not scaling(c).values:
        c = Config({**c.values, "rope_parameters": gpt_oss.ROPE})
    return read_rope(c, max_position, dim, theta=_THETAS.get(architecture, 10000.0))


def _experts(c: Config, architecture: str, layers: int) -> Experts | None:
    """Transformers 5 writes Qwen3-MoE's num_experts as num_local_experts, too."""
    mixtral = architecture == "MixtralForCausalLM"
    if not mixtral and architecture != "Qwen3MoeForCausalLM":
        return None
    local = c.values.get("num_experts") is None and c.values.get("num_local_experts") is not None
    field = "num_local_experts" if mixtral or local else "num_experts"
    count, top_k = c.count(field, most=MANY), c.count("num_experts_per_tok")
    if top_k > count:
        raise c.wrong("num_experts_per_tok", f"at most {field} ({count})")
    if c.get("mlp_bias", bool, False):
        raise c.wrong("mlp_bias", "false: experts have none")
    if mixtral:
        return Experts(MoeSpec(count, top_k), c.count("intermediate_size"))
    routing = MoeSpec(count, top_k, renormalise=c.get("norm_topk_prob", bool, False))
    dense = _dense_layers(c, layers)
    return Experts(routing, c.count("moe_intermediate_size"), dense) if len(dense) < layers else None


def _dense_layers(c: Config, layers: int) -> frozenset[int]:
    named, step = c.values.get("mlp_only_layers"), c.count("decoder_sparse_step", 1)
    named = [] if named is None else named
    if not isinstance(named, list) or not all(type(i) is int and 0 <= i < layers for i in named):
        raise c.wrong("mlp_only_layers", f"a list of layers, 0 to {layers - 1}")
    return frozenset(i for i in range(layers) if i in named or (i + 1) % step)


def eos_ids(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """The eos_token_id of every config, each an id, a list of ids, or absent."""
    out: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i <= MOST for i in ids):
            raise ModelError(f"model config: eos_token_id is {value!r}; expected token ids")
        out.update(ids)
    return tuple(sorted(out))


def _dtype(c: Config) -> DType:
    name = c.get("dtype", str, c.get("torch_dtype", str, "bfloat16"))
    if name not in _DTYPES:
        raise c.wrong("dtype" if c.values.get("dtype") else "torch_dtype", f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
