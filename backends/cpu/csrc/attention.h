// ATTEND: writes this batch's k and v into the pages, then one flash-attention kernel for decode and prefill alike
// (Dao et al., FlashAttention, 2022: running maximum and sum over blocks of keys).
//
// A work item is (sequence, kv head, tile of query rows); a row is a (token, head of the group) pair. Keys come in
// blocks of 64 at absolute positions and each row's arithmetic knows nothing of its tile, so a token gets the same bits
// in decode, in a chunk and in a whole prefill. A block that is masked for a row leaves the row's state as it was.
#pragma once
#include "context.h"
#include "micro.h"
#include "tiles.h"

static constexpr int FEW = MAX_ROWS / 2, TILE = 4 * MAX_ROWS, BLOCK = 64, CHUNK = 16;
alignas(64) static char given_back[CHUNK * 1024 * sizeof(float)];  // zeros: values where the table has page 0

template <class T> struct Cache {  // one layer's pages, as one head sees them
    T* base;
    int64_t Hk, D, page;
    T* k(int64_t p, int64_t h) const { return base + (p * Hk + h) * 2 * page * D; }
    T* v(int64_t p, int64_t h) const { return k(p, h) + page * D; }
    static constexpr int pair = sizeof(T) == 2 ? 2 : 1;
    void write(int64_t slot, int64_t h, const T* key, const T* value) const {
        int64_t p = slot / page, i = slot % page;
        T *ks = k(p, h) + i * pair, *vs = v(p, h) + i / pair * D * pair + i % pair;
        for (int64_t d = 0; d < D; d++) ks[d / pair * page * pair + d % pair] = key[d], vs[d * pair] = value[d];
    }
    const T* k_chunk(int64_t p, int64_t h, int64_t i) const { return k(p, h) + i * pair; }
    const T* v_chunk(int64_t p, int64_t h, int64_t i) const { return v(p, h) + i * D; }
};

template <class T> struct Tile {  // scratch of one work item
    Panel<T>* q;                  // [TILE][D]
    Panel<T>* p;                  // [TILE][BLOCK] probabilities
    float* s;                     // [TILE][BLOCK] scores
    float* o;                     // [TILE][D]
    T* tail;                      // [CHUNK][D] a last chunk of v whose unwritten keys are zero
    float top[TILE], sum[TILE];
    int64_t position[TILE];
    int configured = 0;  // rows that the tile registers are set up for

    explicit Tile(int64_t D) {
        char* m = scratch((TILE * (D + BLOCK) * 8) + CHUNK * D * sizeof(T) + 256);
        o = (float*)m, s = o + TILE * D, q = (Panel<T>*)(s + TILE * BLOCK), p = q + TILE * D, tail = (T*)(p + TILE * BLOCK);
    }
};

static inline void narrow(float* p, VF x) { st(p, x); }
static inline void narrow(bf16* p, VF x) { st(p, x); }

// Scores of one row to probabilities, its maximum and sum brought up to date; o is rescaled. `keys` from `k0` on are
// visible in [lo, hi).
template <class T>
static void softmax_row(Tile<T>& t, int r, int64_t k0, int64_t lo, int64_t hi, int64_t D, float scale, float cap) {
    float* s = t.s + r * BLOCK;
    if (lo < k0) lo = k0;
    if (hi > k0 + BLOCK) hi = k0 + BLOCK;
    if (lo >= hi) {
        memset((void*)(t.p + r * BLOCK), 0, BLOCK * sizeof(Panel<T>));
        return;
    }
    VF top = set1(-INFINITY);
    for (int64_t j = 0; j < lo - k0; j++) s[j] = -INFINITY;
    for (int64_t j = hi - k0; j < BLOCK; j++) s[j] = -INFINITY;
    for (int j = 0; j < BLOCK; j += W) {
        VF x = mul(ld(s + j), set1(scale));
        if (cap > 0) st(s + j, x = mul(set1(cap), vtanh(div(x, set1(cap)))));
        else st(s + j, x);
        if (cap <= 0) top = vmax(x, top);
    }
    if (cap > 0) {
        for (int64_t j = 0; j < lo - k0; j++) s[j] = -INFINITY;
        for (int64_t j = hi - k0; j < BLOCK; j++) s[j] = -INFINITY;
        for (int j = 0; j < BLOCK; j += W) top = vmax(ld(s + j), top);
    }
    float m = hmax(top);
    m = m > t.top[r] ? m : t.top[r];
    const VF shift = set1(m == -INFINITY ? 0.0f : m);
    float fix[W] = {1.0f};
    if (m != t.top[r]) st(fix, vexp(sub(set1(t.top[r]), shift)));
    VF sum = set1(0.0f);
    for (int j = 0; j < BLOCK; j += W) {
        VF e = vexp(sub(ld(s + j), shift));
        sum = add(sum, e);
        narrow(t.p + r * BLOCK + j, e);
    }
    t.sum[r] = t.sum[r] * fix[0] + hsum(sum);
    t.top[r] = m;
    if (fix[0] != 1.0f) {
        float* o = t.o + r * D;
        for (int64_t d = 0; d < D; d += 16)
            for (int j = 0; j < 16; j += W) st(o + d + j, mul(ld(o + d + j), set1(fix[0])));
    }
}

template <class T> struct Attention {
    const Op& o;
    const Context& c;
    Cache<T> cache{(T*)o.p[3], o.n[1], o.n[2], o.n[6]};
    const float* sinks = (const float*)o.p[4];
    const int64_t Hq = o.n[0], Hk = o.n[1], D = o.n[2], G = Hq / Hk, page = o.n[6], window = o.n[7], group = o.n[8];

    void write() const {
        int64_t from, to;
        c.share(c.h->T, from, to);
        const int32_t* slots = c.h->slots + group * c.h->T;
        for (int64_t r = from; r < to; r++)
            for (int64_t h = 0; h < Hk; h++)
                cache.write(slots[r], h, (const T*)o.p[1] + r * o.n[4] + h * D, (const T*)o.p[2] + r * o.n[5] + h * D);
    }

    // The places of the keys and values of a block, by chunks of 16; how many there are. Keys given back are masked,
    // but a weight of 0 would leave a NaN among their values as it is.
    int places(const int32_t* pages, int64_t h, int64_t k0, int64_t hi, const void** k, const void** v) const {
        int n = 0;
        for (int64_t i = k0; i < k0 + BLOCK && i < hi; i += CHUNK, n++) {
            const int32_t p = pages[i / page];
            k[n] = cache.k_chunk(p, h, i % page), v[n] = p ? cache.v_chunk(p, h, i % page) : (const T*)given_back;
        }
        return n;
    }

    // One block of keys for `rows` query rows; keys at or beyond `kv` hold anything.
    void block(Tile<T>& t, int rows, const int32_t* pages, int64_t h, int64_t k0, int64_t hi, int64_t kv) const {
        const void *k[BLOCK / CHUNK], *v[BLOCK / CHUNK], *next_k[BLOCK / CHUNK], *next_v[BLOCK / CHUNK];
        const int chunks = places(pages, h, k0, hi, k, v), next = places(pages, h, k0 + BLOCK, hi, next_k, next_v);
        for (int i = next; i < chunks; i++) next_k[i] = k[i], next_v[i] = v[i];
        const int64_t tail = kv - k0 - (chunks - 1) * CHUNK;  // keys written in the last chunk, or more than it holds
        if (tail < CHUNK) v[chunks - 1] = zero_tail(t.tail, (const T*)v[chunks - 1], tail);
        score(t, rows, k, next_k, chunks);
        for (int r = 0; r < rows; r++) {
            int64_t end = t.position[r] + 1, lo = window ? end - window : 0;
            softmax_row(t, r, k0, lo, end, D, o.f[0], o.f[1]);
        }
        weigh(t, rows, v, next_v, chunks);
    }

    // t.s = q k^T
    void score(Tile<T>& t, int rows, const void* const* k, const void* const* next, int chunks) const {
#if PX_AMX
        if (tiled) return tiled_scores(t, rows, k, next, chunks);
#endif
        if (rows <= FEW) return few_scores(t, rows, k, next, chunks);
        for (int i = 0; i < chunks; i++)
            for (int r = 0; r < rows; r += MAX_ROWS)
                product(rows - r, r == 0, t.q + r * D, D, {k + i, next + i, 1, (int)D, page}, 0,
                        t.s + r * BLOCK + i * CHUNK, BLOCK, false);
    }

    // t.o += p v
    void weigh(Tile<T>& t, int rows, const void* const* v, const void* const* next, int chunks) const {
#if PX_AMX
        if (tiled) return tiled_sums(t, rows, v, next, chunks);
#endif
        const Segments s{v, next, chunks, CHUNK, D};
        const bool few = rows <= FEW && D % (4 * W) == 0;
        for (int64_t d = 0; few && d < D; d += 4 * W)
            micro_rows<T, 4, W / 4, FEW>(rows, t.p, BLOCK, s, (int)d, t.o + d, D, true);
        for (int r = 0; !few && r < rows; r += MAX_ROWS)
            for (int64_t d = 0; d < D; d += 16)
                product(rows - r, r == 0, t.p + r * BLOCK, BLOCK, s, (int)d, t.o + r * D + d, D, true);
    }

#if PX_AMX
    // 16 rows of q or p at a time, in tile 4 or 5, times 16 columns in 6 or 7, to 0-3. A tile that is not full holds
    // rows of an earlier item; they go nowhere. All rows of a batch take this way, or a row's bits would depend on it.
    const bool tiled = sizeof(T) == 2 && D % 64 == 0;

    static void configure(int rows) {
        TileConfig t;
        for (int i = 0; i < 5; i++) t.set(i, rows);
        t.set(5, rows, CHUNK * 2);
        t.set(6, 16);
        t.set(7, CHUNK / 2);
        _tile_loadconfig(&t);
    }

    static void load(float* c, int64_t stride) {
        _tile_loadd(0, c, stride * 4);
        _tile_loadd(1, c + 16, stride * 4);
        _tile_loadd(2, c + 32, stride * 4);
        _tile_loadd(3, c + 48, stride * 4);
    }
    static void store(float* c, int64_t stride) {
        _tile_stored(0, c, stride * 4);
        _tile_stored(1, c + 16, stride * 4);
        _tile_stored(2, c + 32, stride * 4);
        _tile_stored(3, c + 48, stride * 4);
    }

    void tiled_scores(Tile<T>& t, int rows, const void* const* k, const void* const* next, int chunks) const {
        const T* b[4];
        for (int i = 0; i < 4; i++) b[i] = (const T*)k[i < chunks ? i : chunks - 1];
        for (int r = 0; r < rows; r += 16) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < D; d += 32) {
                for (int i = 0; r == 0 && i < chunks; i++)
                    for (int j = 0; j < 16; j++)
                        _mm_prefetch((const char*)((const T*)next[i] + (d + 2 * j) * page), _MM_HINT_T0);
                _tile_loadd(4, t.q + r * D + d, D * 2);
                _tile_loadd(6, b[0] + d * page, page * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(6, b[1] + d * page, page * 4);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(6, b[2] + d * page, page * 4);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(6, b[3] + d * page, page * 4);
                _tile_dpbf16ps(3, 4, 6);
            }
            store(t.s + r * BLOCK, BLOCK);
        }
    }

    void tiled_sums(Tile<T>& t, int rows, const void* const* v, const void* const* next, int chunks) const {
        for (int r = 0; r < rows; r += 16)
            for (int64_t d = 0; d < D; d += 64) {
                float* c = t.o + r * D + d;
                load(c, D);
                for (int i = 0; i < chunks; i++) {
                    const T *b = (const T*)v[i] + 2 * d, *ahead = (const T*)next[i] + 2 * d;
                    for (int j = 0; r == 0 && j < 32; j++)
                        _mm_prefetch((const char*)(ahead + j / 4 * 2 * D + j % 4 * 32), _MM_HINT_T0);
                    _tile_loadd(5, t.p + r * BLOCK + i * CHUNK, BLOCK * 2);
                    _tile_loadd(7, b, D * 4);
                    _tile_dpbf16ps(0, 5, 7);
                    _tile_loadd(7, b + 32, D * 4);
                    _tile_dpbf16ps(1, 5, 7);
                    _tile_loadd(7, b + 64, D * 4);
                    _tile_dpbf16ps(2, 5, 7);
                    _tile_loadd(7, b + 96, D * 4);
                    _tile_dpbf16ps(3, 5, 7);
                }
                store(c, D);
            }
    }
#endif

    // Scores of at most FEW rows, four vectors of keys at a time: the rows of one decode token make too few chains by
    // themselves. Vectors beyond the last chunk repeat it; their scores are masked.
    void few_scores(Tile<T>& t, int rows, const void* const* k, const void* const* next, int chunks) const {
        const T *b[BLOCK / W], *ahead[BLOCK / W];
        for (int j = 0; j < BLOCK / W; j++) {
            const int i = j / V16 < chunks ? j / V16 : chunks - 1, lane = j % V16 * W * cache.pair;
            b[j] = (const T*)k[i] + lane, ahead[j] = (const T*)next[i] + lane;
        }
        for (int j = 0; j < chunks * V16; j += 4)
            fan_rows<T, 4, FEW>(rows, t.q, D, b + j, ahead + j, page, (int)D, t.s + j * W, BLOCK);
    }

    // 16 columns of up to MAX_ROWS rows; the first rows of a tile read ahead for the next block.
    static void product(int rows, bool first, const Panel<T>* a, int64_t lda, Segments s, int column, float* c, int64_t ldc,
                        bool accumulate) {
        if (rows > MAX_ROWS) rows = MAX_ROWS;
        if (first)
            micro_rows<T, V16, 1>(rows, a, lda, s, column, c, ldc, accumulate);
        else
            micro_rows<T, V16, 0>(rows, a, lda, s, column, c, ldc, accumulate);
    }

    const T* zero_tail(T* out, const T* v, int64_t valid) const {
        memcpy(out, v, CHUNK * D * sizeof(T));
        for (int64_t k = valid; k < CHUNK; k++)
            for (int64_t d = 0; d < D; d++) out[k / cache.pair * D * cache.pair + d * cache.pair + k % cache.pair] = 0;
        return out;
    }

    // Rows first.. of sequence s and kv head h.
    void tile(Tile<T>& t, int64_t s, int64_t h, int64_t first, int rows) const {
        const int64_t q0 = c.h->cu_q[s], kv = c.h->kv_len[s], before = kv - (c.h->cu_q[s + 1] - q0);
        const int32_t* pages = c.h->pages + (group * c.h->S + s) * c.h->page_stride;
        for (int r = 0; r < rows; r++) {
            int64_t token = (first + r) / G, head = h * G + (first + r) % G;
            widen((const T*)o.p[0] + (q0 + token) * o.n[3] + head * D, t.q + r * D, D);
            t.position[r] = before + token, t.top[r] = sinks ? sinks[head] : -INFINITY, t.sum[r] = sinks ? 1 : 0;
        }
        memset(t.o, 0, rows * D * sizeof(float));
#if PX_AMX
        const int tall = rows < 16 ? rows : 16;
        if (tiled && tall != t.configured) configure(t.configured = tall);
#endif
        int64_t hi = t.position[rows - 1] + 1, lo = window ? t.position[0] + 1 - window : 0;
        for (int64_t k0 = lo > 0 ? lo / BLOCK * BLOCK : 0; k0 < hi; k0 += BLOCK) block(t, rows, pages, h, k0, hi, kv);
        for (int r = 0; r < rows; r++) {
            int64_t token = (first + r) / G, head = h * G + (first + r) % G;
            T* out = (T*)o.p[5] + (q0 + token) * Hq * D + head * D;
            const VF sum = set1(t.sum[r]);
            PX_EACH(d, D, S(out, div(L(t.o + r * D), sum));)
        }
    }

    // Items are numbered sequence by sequence, and within one from its last (longest) tile to its first.
    void read() const {
        Tile<T> t(D);
        int64_t s = 0, before = 0;
        for (int64_t item; item = c.take(), true;) {
            int64_t rows = 0, tiles = 0;
            for (; s < c.h->S; s++) {
                rows = (c.h->cu_q[s + 1] - c.h->cu_q[s]) * G, tiles = (rows + TILE - 1) / TILE;
                if (item < before + tiles * Hk) break;
                before += tiles * Hk;
            }
            if (s >= c.h->S) break;
            int64_t first = (tiles - 1 - (item - before) / Hk) * TILE, h = (item - before) % Hk;
            tile(t, s, h, first, (int)(rows - first < TILE ? rows - first : TILE));
        }
#if PX_AMX
        if (t.configured) _tile_release();
#endif
    }
};

template <class T> static void attend(const Op& o, const Context& c) {
    Attention<T> a{o, c};
    a.write();
    c.barrier();
    a.read();
}
