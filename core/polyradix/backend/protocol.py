"""The contract between the core and a backend, version 1.0.

Read this file whole before writing a backend; it is meant to be read in one sitting. `Array`, `KV`, `Weight` and
`Meta` are opaque to the core: it passes them on and never looks inside. Shapes use T tokens and S sequences of one
ragged batch (both padded by the backend as it likes), H hidden size, D head size, V vocabulary, F feed-forward width.

Rules every backend keeps:

* KV is a linear value. A call that takes a KV and returns one has consumed the old handle. Backends may mutate in place
  and return the same object, or donate; the core uses only the newest handle.
* Page 0 is scratch: padding rows write there. Where a table has it for a page given back (see HostBatch), a backend may
  read it, but nothing of it may show, NaN and infinity included. Page ids and slots are never negative.
* `attend`, `attend_latent` and `attend_sparse` write this batch's rows into the cache first and read afterwards.
* Activations are in the model's dtype, norm statistics and softmax in float32, logits always float32. Graphs use no
  arithmetic operators; every computation is a verb.
* When `caps.batch_invariant` is true, the result for one token does not depend on what else is in the batch: the core
  then promises users that a prefix hit is bit-exact with a miss.
* What a capability claims must work; what it does not claim must raise `Unsupported`, never return an answer.
* Want of memory is a MemoryError. Whatever call notices that the device can do nothing more raises `DeviceLost`.
* A model may be split over tp ranks (tensor parallelism). Every shape, head count and export in this file is the whole
  model's. Only Arrays inside a step are a rank's own, where the shapes below are divided by tp. What the backend cannot
  split evenly raises `Unsupported` or ValueError with the field and its value, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

import ml_dtypes
import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import Capabilities

PROTOCOL_VERSION = (1, 0)

Array: TypeAlias = Any  # a device array of this backend
KV: TypeAlias = Any  # the paged cache of all layers, or inside a layer body, of one layer, which knows its group
Weight: TypeAlias = Any  # one packed parameter
Meta: TypeAlias = Any  # one prepared batch
HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DType = Literal["float32", "bfloat16"]
HOST_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KVDType = Literal["float32", "bfloat16", "float8_e4m3fn"]
KV_DTYPES = {**HOST_DTYPES, "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
FLOAT8_MAX = 448.0
Gate = Literal["silu", "gelu_tanh"]  # x * sigmoid(x), and x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
ParamKind = Literal[
    "embed", "linear", "linear_reduce", "norm", "rope", "logits", "router", "experts", "latent_up", "sinks"
]
ParamPart = Literal["weight", "bias", "scale", "zero"]


@dataclass(frozen=True)
class Quant:
    """A weight [..., out, in] kept as its checkpoint has it: a code for each value, and for each block of `block` rows
    and columns a scale float32 [..., blocks down, blocks across], where the last blocks may be cut off.

        weight[i, j] = (code[i, j] - zero[i // rows, j // columns]) * scale[i // rows, j // columns]

    Codes of `fp8` are float8_e4m3fn of the weight's shape, and there is no zero. Those of `int4` are 0 to 15, uint8
    [..., out, in / 2] with the even column in the low nibble; zero is uint8, of scale's shape, and columns is even.

    A verb multiplies by this weight, in float32 or rounded to the spec's dtype. Activations stay in the spec's dtype.
    """

    format: Literal["fp8", "int4"]
    block: tuple[int, int]

    @property
    def feature(self) -> str:
        """What a backend claims that keeps such weights. For others the core dequantises before `pack`."""
        return f"quant_{self.format}"

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of codes, scales and zeros."""
        (*outer, out, width), (rows, columns) = shape, self.block
        blocks = -(-out // rows) * -(-width // columns)
        return prod(outer) * (out * width // 2 + 5 * blocks if self.format == "int4" else out * width + 4 * blocks)


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter, as the graph names it.

    `shape` is [out, in] for linears and logits, [V, H] for embed, [n] for norm (float32 or the model's dtype),
    [positions, D] float32 for rope (cos in the first D/2 columns, sin in the rest). `segments` are the row counts of
    parts fused along axis 0 (q, k, v or gate, up): each part is sharded by itself. `shard_axis` is the axis split over
    tensor-parallel ranks, None for replicated: 0 for linears, logits (V need not be a multiple of tp), experts and
    latent_up, 1 for linear_reduce, whose bias every rank has.
    experts are [experts, out, in]: whole experts are sharded, rank r holds the r-th of tp equal runs of ids; their bias
    is [experts, out]. router is [experts, H] float32, replicated; MoeSpec says what its bias is added to. latent_up is
    [heads, nope + v, R], see LatentSpec, and sinks are [Hq] float32; their heads are sharded as experts are.
    backend/shard.py does the splitting, for backends that want it.
    `quant`, of linear, linear_reduce and experts, says that the Reader gives codes, scales and zeros. Segments, and
    ranks' shards, are whole blocks.
    """

    name: str
    kind: ParamKind
    shape: tuple[int, ...]
    dtype: DType
    segments: tuple[int, ...] = ()
    shard_axis: int | None = None
    bias: bool = False
    quant: Quant | None = None

    @property
    def bytes(self) -> int:
        """Of the weight, without bias."""
        if self.quant is not None:
            return self.quant.bytes(self.shape)
        return prod(self.shape) * HOST_DTYPES[self.dtype].itemsize


class Reader(Protocol):
    """Gives the host values of one parameter, in its spec's shape and dtype (bfloat16 is ml_dtypes'), or as its Quant
    says; `scale` and `zero` only with one."""

    def __call__(self, part: ParamPart = "weight") -> HostArray: ...


@dataclass(frozen=True)
class Params:
    """Packed parameters: `top` by name, and one mapping per layer."""

    top: dict[str, Weight]
    layers: list[dict[str, Weight]]


@dataclass(frozen=True)
class KVSpec:
    """Shape of the paged cache: `depth` arrays, each `parts` times [pages, page_size, kv_heads, head_dim].

    Parts of kind `full` are k and v. Kind `latent` has one part, the rows of `attend_latent`: kv_heads is 1 and
    head_dim is LatentSpec's rank + rope; every rank holds all of it. Rows of `attend_sparse` have `index` columns more,
    IndexSpec's dim, which head_dim includes; a backend may keep them apart.

    A full cache may be float8_e4m3fn (feature kv_fp8), whatever the dtype of activations. It holds the nearest value to
    each, ties to even, and FLOAT8_MAX or its negative for what is beyond; attention reads these, of this batch too.

    Without `groups` each layer has an array, and all share one table of pages. With them (feature kv_groups, of kind
    full) layers that keep different tokens, as full and windowed ones do, have pages of their own. There are two groups
    or more; each names its layers, ascending, and every layer is in one. The layer at place j of a group has array j,
    and its rows are in pages of its group's table; so all pages have the same bytes, whichever group they are used for,
    and `depth` is the size of the largest group. A page is copied, exported and imported by id, with all arrays.

    Raises ValueError for groups that are not so.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: KVDType
    kind: Literal["full", "latent"] = "full"
    index: int = 0
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.groups and not (
            len(self.groups) > 1
            and self.kind == "full"
            and sorted(i for group in self.groups for i in group) == list(range(self.layers))
            and all(group and list(group) == sorted(group) for group in self.groups)
        ):
            expected = f"none, or of kind full two or more of layers 0 to {self.layers - 1}, ascending, each once"
            raise ValueError(f"KVSpec.groups is {self.groups}; expected {expected}")

    @property
    def parts(self) -> int:
        return 1 if self.kind == "latent" else 2

    @property
    def depth(self) -> int:
        return max(map(len, self.groups), default=self.layers)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of each layer its group, and its place there."""
        if not self.groups:
            return [(0, place) for place in range(self.layers)]
        found = {layer: (g, place) for g, group in enumerate(self.groups) for place, layer in enumerate(group)}
        return [found[layer] for layer in range(self.layers)]


@dataclass(frozen=True)
class Limits:
    """The largest batch that will ever be prepared."""

    max_tokens: int
    max_seqs: int
    max_context: int  # tokens of one sequence, prompt and output together

    def check(self, sizes: tuple[int, int, int]) -> None:
        """Raises ValueError for a batch of HostBatch.sizes beyond these."""
        names, most = ("num_tokens", "num_seqs", "kv_len"), (self.max_tokens, self.max_seqs, self.max_context)
        for name, size, limit in zip(names, sizes, most, strict=True):
            if size > limit:
                raise ValueError(f"batch has {name} {size}; expected at most {limit}, the limit given to compile")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device; of several, the one with the least free."""

    free: int
    total: int


@dataclass(frozen=True)
class Heads:
    q: int
    kv: int
    dim: int


@dataclass(frozen=True)
class AttnSpec:
    """Causal attention. `scale` multiplies q.k; `window` w keeps keys with position > query position - w (None: all);
    `softcap` c maps scores to c * tanh(score / c) (None: off). `sinks`, of kind sinks, are scores of one key more for
    each query head, whose value is zero: they are in the softmax's denominator alone, neither scaled nor capped."""

    heads: Heads
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Weight | None = None


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (MLA), causal: all heads share one row of R = `rank` latent and `rope` key columns.

    A head of q is `nope` columns, then `rope` columns; c is [T, rank + rope]. Of a new row, c[:rank] is normed with
    `eps`, and c[rank:] and the rope columns of q are rotated, half-split; each is rounded to the dtype of q. The row
    (c, k) goes to the cache. With the first `nope` rows of a head's latent_up as K and the other `v` rows as V,

        score[s] = scale * t * (q_nope . K c[s] + q_rope . k[s])        out = sum of softmax(score)[s] * V c[s]

    over all s up to the query's position p, where t = 1 + attn_scale * ln(1 + floor(p / floor_scale)). A backend may
    take the products in any order: `expanded` makes K c and V c of every row, `absorbed` q_nope K once a query and V of
    the sum; it may round what it makes to the dtype of q.
    Source: DeepSeek-V2 (arXiv 2405.04434), 2.1; t is Llama 4's attention temperature, of positions from 0.
    """

    heads: int
    rank: int
    nope: int
    rope: int
    v: int
    scale: float
    eps: float
    attn_scale: float = 0.0
    floor_scale: int = 1


@dataclass(frozen=True)
class LatentWeights:
    """Of one layer: norm [rank], of kind latent_up [heads, nope + v, rank], and the rope table of `rope` columns."""

    norm: Weight
    up: Weight
    table: Weight


@dataclass(frozen=True)
class IndexSpec:
    """Which rows a token of `attend_sparse` sees: the `top_k` that the indexer, a small attention, scores highest.

    Each row has a key: k [T,dim] less its mean, divided by sqrt(variance + eps), times norm's weight, plus its bias.
    The first LatentSpec.rope columns of the key and of every head of q [T,heads*dim] are rotated, half-split, by the
    table of LatentWeights; both are rounded to the dtype of q, and the key goes to the cache behind its row. In
    float32, with weights [T,heads],

        score[s] = sum over heads h of weights[h] * max(0, q[h] . key[s])

    Of the rows up to a token's own, the `top_k` with the largest scores are seen, or all if there are no more. Of equal
    scores the lower position wins. Every rank holds all of this and selects the same rows.
    Source: the report on DeepSeek-V3.2-Exp, equations 1 and 2; factors that all scores of a token share are left out.
    """

    heads: int
    dim: int
    top_k: int
    eps: float


@dataclass(frozen=True)
class Index:
    """What `attend_sparse` selects by, see IndexSpec: q, k and weights as projections gave them, and the norm [dim], of
    kind norm with a bias."""

    q: Array
    k: Array
    weights: Array
    norm: Weight


@dataclass(frozen=True)
class MoeSpec:
    """How `moe` sends each token to `top_k` of `experts`. All of it is float32, never rounded to the dtype of x.

    logits = x router^T, plus the router's bias, if there is one and `bias` is "logits". Scores are their softmax over
    all experts, or each one's sigmoid. An expert's choice value is its score, plus the router's bias, if there is one
    and `bias` is "choice". Experts form `groups` of equal size, in the order of their ids. The `top_groups` stay whose
    `group_best` best choice values have the largest sum; an expert of another group is never chosen, however low the
    values are. Of those that stay, the `top_k` with the best choice values are chosen. Of equal values the lower id
    wins, among groups too. A chosen expert's weight is its score, without a bias of choice; with `renormalise` it is
    divided by the sum of the chosen scores plus 1e-20; then it is multiplied by `scale`.
    Source: DeepSeek-V3 (arXiv 2412.19437), 2.1.2; group_best is 2 there, and 1 in DeepSeek-V2.

    An expert's gate is silu, as of `gated`. With a `limit` L it is gpt-oss's clamped SwiGLU: with g = min(gate, L), and
    up cut to -L to L, it is g * sigmoid(alpha * g) * (up + 1).

    Experts that every token goes to (shared ones) are no part of it: a graph adds a gated feed-forward of its own.

    Raises ValueError naming the field for numbers that do not fit each other.
    """

    experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    bias: Literal["choice", "logits"] = "choice"
    limit: float | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        size = self.experts // max(1, self.groups)
        rules = (
            ("groups", self.groups >= 1 and self.experts % self.groups == 0, f"a divisor of experts ({self.experts})"),
            ("top_groups", 1 <= self.top_groups <= self.groups, f"1 to groups ({self.groups})"),
            ("group_best", 1 <= self.group_best <= size, f"1 to the experts of a group ({size})"),
            ("top_k", 1 <= self.top_k <= size * self.top_groups, f"1 to the experts kept ({size * self.top_groups})"),
            ("scoring", self.scoring in ("softmax", "sigmoid"), "'softmax' or 'sigmoid'"),
            ("bias", self.bias in ("choice", "logits"), "'choice' or 'logits'"),
            ("limit", self.limit is None or self.limit > 0, "a number above 0, or None"),
        )
        for name, good, expected in rules:
            if not good:
                raise ValueError(f"MoeSpec.{name} is {getattr(self, name)!r}; expected {expected}")


@dataclass(frozen=True)
class MoeWeights:
    """Of one layer: the router, kind router [experts,H]; and of kind experts, gate_up [experts,2F,H], in which an
    expert's gate rows come before its up rows, and down [experts,H,F]."""

    router: Weight
    gate_up: Weight
    down: Weight


class Collectives(Protocol):
    """What tensor-parallel ranks tell each other, inside a step. Each gives an Array of its own, all of one shape and
    dtype, and all call the same verbs in the same order: one program serves every rank and cannot ask which it is. An
    axis that is cut must be a multiple of `size`. With one rank every verb is the identity (backend/alone.py)."""

    size: int

    def all_reduce(self, x: Array) -> Array: ...  # the sum over ranks, the same bits on every rank
    def all_gather(self, x: Array, axis: int) -> Array: ...  # every rank's, joined along axis in rank order
    def reduce_scatter(self, x: Array, axis: int) -> Array: ...  # rank r has part r of the sum, cut along axis
    def all_to_all(self, x: Array, axis: int) -> Array: ...  # part i goes to rank i; received ones joined in rank order
    def broadcast(self, x: Array, root: int) -> Array: ...  # rank root's
    def permute(self, x: Array, to: Sequence[int]) -> Array: ...  # rank r's goes to rank to[r]; `to` is a permutation
    def barrier(self) -> None: ...  # nobody goes on before all are here; a traced program, ordered by data, may skip it


class Ops(Protocol):
    """The verbs a model graph is made of. Pure but for KV; called inside `Compiled`, possibly while tracing."""

    def embed(self, w: Weight, m: Meta) -> Array: ...  # [T,H]
    def linear(self, x: Array, w: Weight) -> Array: ...  # [T,I] -> [T,O/tp], bias included if the spec has one
    def linear_reduce(self, x: Array, w: Weight) -> Array: ...  # [T,I/tp] -> [T,O], summed over tp, then bias
    def qkv(self, x: Array, w: Weight, heads: Heads) -> tuple[Array, Array, Array]: ...  # [T,Hq/tp,D], 2 x [T,Hk/tp,D]
    def add(self, x: Array, y: Array) -> Array: ...  # elementwise, rounded to the dtype of x
    def rms_norm(self, x: Array, w: Weight, eps: float) -> Array: ...  # over the last axis: [T,H], or [T,heads,D]
    def rope(self, q: Array, k: Array, table: Weight, m: Meta) -> tuple[Array, Array]: ...  # half-split (NeoX) pairs
    def attend(self, q: Array, k: Array, v: Array, kv: KV, m: Meta, a: AttnSpec) -> tuple[Array, KV]: ...  # [T,Hq/tp*D]
    # q [T,Hq/tp*(nope+rope)] not yet rotated and c [T,R+rope] neither normed nor rotated -> [T,Hq/tp*v]
    def attend_latent(
        self, q: Array, c: Array, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Array, KV]: ...
    def attend_sparse(  # attend_latent over the rows that `s` selects
        self, q: Array, c: Array, x: Index, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Array, KV]: ...
    def gated(self, x: Array, kind: Gate) -> Array: ...  # [T,2F] -> [T,F]: act(first half) * second half
    # The sum over a row's chosen experts of weight * down(gated(gate_up(row))), taken in float32, over tp too. Experts
    # have no capacity: no row is dropped, and a row, padding included, changes no other.
    def moe(self, x: Array, w: MoeWeights, s: MoeSpec) -> Array: ...  # [T,H] -> [T,H]
    def last(self, x: Array, m: Meta) -> Array: ...  # [T,H] -> [S,H], the rows HostBatch.last names
    # [S,H] -> [S,V] float32, gathered over tp; `softcap` as of AttnSpec
    def logits(self, x: Array, w: Weight, softcap: float | None = None) -> Array: ...
    # One layer after the other, bodies[i] for layer i. Where two layers have the same body and parameters of the same
    # names and shapes, a compiler may trace one for both.
    def layers(
        self, bodies: Sequence[LayerBody], params: Sequence[dict[str, Weight]], carry: Any, kv: KV
    ) -> tuple[Any, KV]: ...

    # Fused verbs: each has an expansion in backend/expand.py, which a backend inherits until its own is faster.
    def add_rms_norm(self, x: Array, residual: Array, w: Weight, eps: float) -> tuple[Array, Array]: ...  # normed, sum
    def linear_gated(self, x: Array, w: Weight, kind: Gate) -> Array: ...  # gated(linear(x, w), kind)


LayerBody: TypeAlias = Callable[[dict[str, Weight], Any, KV], tuple[Any, KV]]  # (layer params, carry, layer kv)
Step: TypeAlias = Callable[[Ops, Params, KV, Meta], tuple[Array, KV]]  # returns logits [S,V] and the new KV
Compiled: TypeAlias = Callable[[Params, KV, Meta], tuple[Array, KV]]  # launches; may return before it is done


class Backend(Protocol):
    """The host side: one model's whole mesh, made by the entry point's `create(**options)`, with `tp=N` for N ranks.
    How it drives them (threads, processes, one partitioned program) is its own affair."""

    caps: Capabilities
    ops: Ops
    collectives: Collectives

    def memory(self) -> Memory: ...
    def pack(self, spec: ParamSpec, read: Reader) -> Weight: ...  # into the backend's own layout, placed on the device
    def kv_page_bytes(self, spec: KVSpec) -> int: ...  # bytes of one page on one device, all arrays
    def alloc_kv(self, spec: KVSpec, pages: int) -> KV: ...  # zeroed; `pages` includes scratch page 0
    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta: ...  # prev: i32[S'], the last samples
    def compile(self, step: Step, limits: Limits) -> Compiled: ...  # eager, capture or jit
    def sample(self, logits: Array, batch: SampleBatch) -> Array: ...  # i32[S]; semantics in backend/sampling.py
    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs: ...  # of the unscaled logits
    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV: ...
    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]: ...  # [part,array,page,slot,head,dim]
    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV: ...  # the same form, KVSpec dtype
    def fetch(self, x: Array) -> Future[HostArray]: ...  # the only device-to-host path; rows beyond S are cut off


@dataclass(frozen=True)
class LogProbs:
    """Natural logs. Each is an Array to be fetched: chosen f32[S]; ids i32[S,top] and values f32[S,top], descending."""

    chosen: Array
    ids: Array
    values: Array


@dataclass(frozen=True)
class Found:
    """What a backend's cheap `probe()` says: usable here or not, with a reason a person can act on."""

    available: bool
    detail: str
    rank: int = 0  # --device auto takes the available backend with the highest rank
    emulated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
