// LINEAR: out = x * w^T (+ bias), or act(gate) * up; one code path from one row to thousands.
//
// Work items are (block of rows) x (run of 32-column tiles), taken dynamically. A block's x is put into the thread's
// scratch once (widened to float32 where the processor has no bf16 product) and small enough to stay in the L2 cache.
#pragma once
#include "context.h"
#include "micro.h"
#include "tiles.h"

// Writes c[rows][32] (packed columns tile*32...) as rows r0... of the output.
template <class O>
static void store_tile(const Op& o, const float* c, int64_t tile, int64_t r0, int rows) {
    const int64_t N = o.n[1], stride = o.n[3], mode = o.n[4];
    const float* bias = (const float*)o.p[2];
    for (int r = 0; r < rows; r++, c += 32) {
        O* out = (O*)o.p[3] + (r0 + r) * stride;
        float t[32];
        for (int j = 0; j < 32; j += W) st(t + j, bias ? add(ld(c + j), ld(bias + tile * 32 + j)) : ld(c + j));
        if (mode == PLAIN) {
            int64_t n = N - tile * 32 < 32 ? N - tile * 32 : 32;
            PX_EACH(j, n, S(out + tile * 32, L(t));)
            continue;
        }
        int64_t n = N / 2 - tile * 16 < 16 ? N / 2 - tile * 16 : 16;
        if (mode == FUSED_SILU)
            PX_EACH(j, n, S(out + tile * 16, mul(vsilu(L(t)), L(t + 16)));)
        else if (mode == FUSED_GELU)
            PX_EACH(j, n, S(out + tile * 16, mul(vgelu(L(t)), L(t + 16)));)
        else
            PX_EACH(j, n, S(out + tile * 16, L(t)); S(out + N / 2 + tile * 16, L(t + 16));)
    }
}

static inline void store_any(const Op& o, const float* c, int64_t tile, int64_t r0, int rows) {
    if (o.n[5])
        store_tile<float>(o, c, tile, r0, rows);
    else
        store_tile<bf16>(o, c, tile, r0, rows);
}

#if PX_AMX
// Tiles 0-3: c (2x2), 4-5: a, 6-7: b, for `rows` <= 32 rows. A lone tile of rows leaves 2, 3 and 5 unused.
static inline void configure(int rows) {
    TileConfig t;
    int top = rows < 16 ? rows : 16, bottom = rows - top;
    for (int i = 0; i < 6; i++) t.set(i, i == 2 || i == 3 || i == 5 ? (bottom ? bottom : 1) : top);
    t.set(6, 16);
    t.set(7, 16);
    _tile_loadconfig(&t);
}

// Rows of x in the order in which the tiles read them: [rows/16][K/32][16][32], so that a tile is 1 KiB in one piece.
static inline void into_tiles(const bf16* x, bf16* a, int64_t r, int64_t Kx, int64_t K) {
    a += r / 16 * 16 * K + r % 16 * 32;
    for (int64_t k = 0; k < K; k += 32, a += 512) {
        const int64_t n = Kx - k < 0 ? 0 : Kx - k < 32 ? Kx - k : 32;
        memcpy(a, x + k, n * 2);
        memset(a + n, 0, 64 - n * 2);
    }
}

// c[rows][32] = a[rows][K], in tiles, * the 32 columns of tile w; K a multiple of 32. `first` reads w ahead.
static inline void amx_tile(int rows, const bf16* a, const bf16* w, int64_t K, float* c, bool first) {
    const bf16* below = a + 16 * K;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32, w += 1024, a += 512, below += 512) {
        for (int i = 0; first && i < 32; i++) _mm_prefetch((const char*)w + 4096 + i * 64, _MM_HINT_T0);
        for (int i = 0; !first && i < 16; i++) _mm_prefetch((const char*)a + 2048 + i * 64, _MM_HINT_T0);
        _tile_loadd(6, w, 128);
        _tile_loadd(7, w + 32, 128);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 16) {
            for (int i = 0; !first && i < 16; i++) _mm_prefetch((const char*)below + 2048 + i * 64, _MM_HINT_T0);
            _tile_loadd(5, below, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    if (rows > 16) {
        _tile_stored(2, c + 16 * 32, 128);
        _tile_stored(3, c + 16 * 32 + 16, 128);
    }
}

// One tile of columns for all rows of a block; `configured` remembers the rows the tiles are set up for.
static void columns(const Op& o, const bf16* a, int64_t tile, int64_t r0, int rows, int& configured) {
    alignas(64) float c[32 * 32];
    const bf16* w = (const bf16*)o.p[1] + tile * 32 * o.n[0];
    for (int r = 0; r < rows; r += 32) {
        int m = rows - r < 32 ? rows - r : 32;
        if (m != configured) configure(configured = m);
        amx_tile(m, a + r * o.n[0], w, o.n[0], c, r == 0);
        store_any(o, c, tile, r0 + r, m);
    }
}
#endif

// A product of `m` <= MAX_ROWS rows with the 32 columns of a tile; `first` reads the weight ahead.
template <class P, class T>
static void columns_part(int m, bool first, const P* x, int64_t lda, const T* w, int depth, float* c) {
    const void *at = w, *ahead = (const char*)w + 2048;
    Segments s{&at, &ahead, 1, depth, 32};
    if (m * 2 <= MAX_ROWS)  // few rows: all 32 columns at once
        return micro_rows<T, 2 * V16, 2, MAX_ROWS / 2>(m, x, lda, s, 0, c, 32, false);
    if (V16 == 1) return micro_rows<T, 2 * V16, 2>(m, x, lda, s, 0, c, 32, false);
    if (first)
        micro_rows<T, V16, 2>(m, x, lda, s, 0, c, 32, false);
    else
        micro_rows<T, V16, 0>(m, x, lda, s, 0, c, 32, false);
    micro_rows<T, V16, 0>(m, x, lda, s, 16, c + 16, 32, false);
}

// Sums of bf16 products that stay float32, of logits, are made of shorter chains: one chain is as far off as its length.
static constexpr int64_t CHAIN = 64;

template <class P, class T>
static void columns(const Op& o, const P* a, int64_t lda, int64_t tile, int64_t r0, int rows, const T* all) {
    alignas(64) float c[MAX_ROWS * 32], part[MAX_ROWS * 32];
    const int64_t K = o.n[0], chain = sizeof(T) == 2 && o.n[5] && K > CHAIN ? CHAIN : K;
    const T* w = all + tile * 32 * K;
    for (int r = 0; r < rows; r += MAX_ROWS) {
        const int m = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
        columns_part(m, r == 0, a + r * lda, lda, w, (int)chain, c);
        for (int64_t k = chain; k < K; k += chain) {
            const int64_t depth = K - k < chain ? K - k : chain;
            columns_part(m, r == 0, a + r * lda + k, lda, w + k * 32, (int)depth, part);
            for (int j = 0; j < m * 32; j += W) st(c + j, add(ld(c + j), ld(part + j)));
        }
        store_any(o, c, tile, r0 + r, m);
    }
}

// Of a panel: not a power of two, as rows must not share cache sets.
template <class P> static int64_t row_stride(int64_t K) { return K + 64 / (int64_t)sizeof(P); }

// Rows whose panel stays in the L2 cache.
template <class P> static int64_t block_rows(int64_t K) {
    const int64_t unit = 96, block = 400 * 1024 / (row_stride<P>(K) * (int64_t)sizeof(P)) / unit * unit;
    return block < unit ? unit : block;
}

// Tiles of columns in a work item, so that there are about four items for each thread.
static inline int64_t run_tiles(int64_t tiles, int64_t blocks, const Context& c) {
    const int64_t run = (tiles * blocks + 4 * c.count - 1) / (4 * c.count);
    return run < 1 ? 1 : run > tiles ? tiles : run;
}

// Rows of x, which `row` points to, into a panel.
template <class T, class R>
static void fill(Panel<T>* a, int64_t lda, int64_t rows, int64_t Kx, int64_t K, R row) {
    for (int64_t r = 0; r < rows; r++) {
#if PX_AMX
        if constexpr (sizeof(T) == 2) {
            into_tiles(row(r), a, r, Kx, K);
            continue;
        }
#endif
        widen(row(r), a + r * lda, Kx);
        memset((void*)(a + r * lda + Kx), 0, (K - Kx) * sizeof(Panel<T>));
    }
}

// The panel's rows times tiles from..to, as rows r0... of the output.
template <class T>
static void columns_of(const Op& o, const Panel<T>* a, int64_t lda, int64_t from, int64_t to, int64_t r0, int64_t rows,
                       [[maybe_unused]] int& configured) {
    for (int64_t t = from; t < to; t++) {
#if PX_AMX
        if constexpr (sizeof(T) == 2)
            columns(o, a, t, r0, (int)rows, configured);
        else
#endif
            columns(o, a, lda, t, r0, (int)rows, (const T*)o.p[1]);
    }
}

static inline void release([[maybe_unused]] int configured) {
#if PX_AMX
    if (configured) _tile_release();
#endif
}

template <class T> static void linear(const Op& o, const Context& c) {
    typedef Panel<T> P;
    static constexpr int STEP = PX_AMX && sizeof(T) == 2 ? 32 : MAX_ROWS;
    const int64_t K = o.n[0], M = c.rows(o), tiles = (o.n[1] + 31) / 32, lda = row_stride<P>(K);
    int64_t block = block_rows<P>(K);
    const int64_t blocks = (M + block - 1) / block, run = run_tiles(tiles, blocks, c);
    if (!blocks) return;
    block = ((M + blocks - 1) / blocks + STEP - 1) / STEP * STEP;
    const int64_t runs = (tiles + run - 1) / run;
    P* a = (P*)scratch(block * lda * sizeof(P));
    int64_t held = -1;
    int configured = 0;
    for (int64_t item; (item = c.take()) < blocks * runs;) {
        const int64_t b = item / runs, r0 = b * block, rows = M - r0 < block ? M - r0 : block, t = item % runs * run;
        if (rows <= 0) continue;
        if (b != held)
            fill<T>(a, lda, rows, o.n[6], K, [&](int64_t r) { return (const T*)o.p[0] + (r0 + r) * o.n[2]; });
        held = b;
        columns_of<T>(o, a, lda, t, t + run < tiles ? t + run : tiles, r0, rows, configured);
    }
    release(configured);
}
