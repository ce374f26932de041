// Latent attention (MLA), absorbed: HEADS takes each head's queries through its K, LATENT makes the rows of the cache and
// puts the rotated columns beside what is absorbed, ATTEND has one kv head of R + rope columns, and HEADS takes each
// head's mean through its V.
#pragma once
#include "gemm.h"
#include "small.h"

// As LINEAR, whose fields the first seven are: for each head its columns of x and of out, and its own weight.
template <class T> static void heads(const Op& o, const Context& c) {
    typedef Panel<T> P;
    const int64_t K = o.n[0], M = c.rows(o), tiles = (o.n[1] + 31) / 32, H = o.n[7];
    const int64_t lda = row_stride<P>(K), block = block_rows<P>(K), blocks = (M + block - 1) / block;
    const int64_t run = run_tiles(tiles, blocks * H, c), runs = (tiles + run - 1) / run;
    P* a = (P*)scratch(block * lda * sizeof(P));
    int64_t held = -1;
    int configured = 0;
    for (int64_t item; (item = c.take()) < H * blocks * runs;) {
        const int64_t b = item / runs, h = b / blocks, t = item % runs * run, r0 = b % blocks * block;
        const int64_t rows = M - r0 < block ? M - r0 : block;
        if (b != held)
            fill<T>(a, lda, rows, o.n[6], K,
                    [&](int64_t r) { return (const T*)o.p[0] + (r0 + r) * o.n[2] + h * (o.n[2] / H); });
        held = b;
        Op mine = o;
        mine.p[1] = (T*)o.p[1] + h * tiles * 32 * K;
        mine.p[3] = (T*)o.p[3] + h * (o.n[3] / H);
        columns_of<T>(mine, a, lda, t, t + run < tiles ? t + run : tiles, r0, rows, configured);
    }
    release(configured);
}

template <class T> static void latent(const Op& o, const Context& c) {
    const int64_t H = o.n[0], nope = o.n[1], half = o.n[2] / 2, R = o.n[3], D = R + o.n[2];
    int64_t from, to;
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) {
        const int64_t position = c.h->positions[r];
        const float* table = (const float*)o.p[3] + position * o.n[2];
        const float t = o.f[1] ? 1.0f + o.f[1] * logf(1.0f + (float)(position / o.n[6])) : 1.0f;
        const T* x = (const T*)o.p[1] + r * o.n[5];
        T* row = (T*)o.p[5] + r * D;
        norm_row(x, (const float*)o.p[2], row, R, o.f[0]);
        rotate(x + R, row + R, table, half);
        for (int64_t h = 0; h < H; h++) {
            T* query = (T*)o.p[4] + (r * H + h) * D;
            rotate((const T*)o.p[0] + r * o.n[4] + h * (nope + o.n[2]) + nope, query + R, table, half);
            if (t != 1.0f) PX_EACH(i, D, S(query, mul(L(query), set1(t)));)
        }
    }
}
