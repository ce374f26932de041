"""DeepSeek-V2, V3, R1, V3.2 and Mistral Large 3: their configs. Graph and parameters are those of mla.py and moe.py."""

from __future__ import annotations

from polyradix.backend.protocol import IndexSpec, LatentSpec, MoeSpec
from polyradix.graph.config import MANY, Config
from polyradix.graph.errors import ModelError
from polyradix.graph.mla import Latent
from polyradix.graph.moe import Experts
from polyradix.graph.rope import Rope, magnitude, read_rope, scaling

ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Mistral4ForCausalLM",
    "MistralLarge3ForCausalLM",
)
_V3 = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM")
_METHODS = {"DeepseekV2ForCausalLM": "greedy", **dict.fromkeys(_V3, "noaux_tc")}  # where a config does not say
_FIELDS = {"groups": "n_group", "top_groups": "topk_group", "top_k": "num_experts_per_tok", "scoring": "scoring_func"}


def latent(c: Config, architecture: str, max_position: int) -> tuple[Latent, Rope]:
    """Attention, and the table of its rotated columns."""
    nope, turned = c.count("qk_nope_head_dim"), c.count("qk_rope_head_dim")
    if turned % 2:
        raise c.wrong("qk_rope_head_dim", "an even number")
    rope, r = read_rope(c, max_position, turned, of=nope + turned), scaling(c)
    if architecture == "Mistral4ForCausalLM" and not r.values:
        raise c.wrong("rope_parameters", "an object")
    stretch = magnitude(rope.factor, r.at_least_0("mscale_all_dim", float, 0.0)) if rope.type == "yarn" else 1.0
    beta = r.at_least_0("llama_4_scaling_beta", float, 0.0)
    attention = LatentSpec(
        heads=c.count("num_attention_heads"),
        rank=c.count("kv_lora_rank"),
        nope=nope,
        rope=turned,
        v=c.count("v_head_dim"),
        scale=(nope + turned) ** -0.5 * stretch**2,
        eps=c.positive("rms_norm_eps", 1e-6),
        attn_scale=beta,
        floor_scale=r.count("original_max_position_embeddings") if beta else 1,
    )
    q_rank = None if c.values.get("q_lora_rank") is None else c.count("q_lora_rank")
    bias = c.get("attention_bias", bool, False)
    index = _index(c, turned) if architecture == "DeepseekV32ForCausalLM" else None
    return Latent(attention, q_rank, c.get("rope_interleave", bool, True), bias, index), rope


def _index(c: Config, turned: int) -> IndexSpec:
    c.count("q_lora_rank")
    dim = c.count("index_head_dim")
    if dim < turned:
        raise c.wrong("index_head_dim", f"at least qk_rope_head_dim ({turned})")
    return IndexSpec(c.count("index_n_heads"), dim, c.count("index_topk"), eps=1e-6)


def experts(c: Config, architecture: str, layers: int) -> Experts | None:
    dense, step = c.at_least_0("first_k_dense_replace", int, 0), c.count("moe_layer_freq", 1)
    sparse = frozenset(i for i in range(layers) if i >= dense and i % step == 0)
    if not sparse or c.values.get("n_routed_experts") is None:
        return None
    inner, shared = c.count("moe_intermediate_size"), c.at_least_0("n_shared_experts", int, 0)
    routing, bias = _routing(c, architecture)
    return Experts(routing, inner, frozenset(range(layers)) - sparse, shared * inner, bias)


def _routing(c: Config, architecture: str) -> tuple[MoeSpec, bool]:
    """And whether the router has a selection bias."""
    method = c.get("topk_method", str, _METHODS.get(architecture, "group_limited_greedy"))
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise c.wrong("topk_method", "'greedy', 'group_limited_greedy' or 'noaux_tc'")
    scoring = c.get("scoring_func", str, "sigmoid" if architecture in _V3 else "softmax")
    groups = 1 if method == "greedy" else c.count("n_group", 8 if architecture in _V3 else 1)
    scale = c.positive("routed_scaling_factor", 2.5 if architecture in _V3 else 1.0)
    count, top_k = c.count("n_routed_experts", most=MANY), c.count("num_experts_per_tok")
    renormalise = c.get("norm_topk_prob", bool, architecture != "DeepseekV2ForCausalLM")
    top_groups = 1 if groups == 1 else c.count("topk_group")
    best = 1 if groups == 1 or architecture == "DeepseekV2ForCausalLM" else 2
    if count < best * groups:
        raise c.wrong("n_group", f"at most n_routed_experts / {best} ({count // best})")
    try:
        routing = MoeSpec(
            experts=count,
            top_k=top_k,
            scoring=scoring,  # type: ignore[arg-type]
            renormalise=renormalise,
            scale=scale,
            groups=groups,
            top_groups=top_groups,
            group_best=best,
        )
    except ValueError as e:
        field, _, rest = str(e).removeprefix("MoeSpec.").partition(" ")
        raise ModelError(f"model config: {_FIELDS.get(field, field)} {rest}") from e
    return routing, method == "noaux_tc"
