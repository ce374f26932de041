// Mixture of experts: ROUTE chooses and sorts, EXPERTS is a product of sorted rows with each one's own weight, and SUM
// puts a token's rows together. The plan is int32: starts [E+1] of the experts' rows, ids [P], and by sorted row the
// pair [P], by pair the sorted row [P], where P = T * top_k and pair t * top_k + k is token t's k-th choice.
#pragma once
#include "gemm.h"

struct Plan {
    int32_t *starts, *ids, *pairs, *rows;
    Plan(void* p, int64_t experts, int64_t count)
        : starts((int32_t*)p), ids(starts + experts + 1), pairs(ids + count), rows(pairs + count) {}
};

static constexpr float LOWEST = -3e38f;  // loses to any other value, and wins against what is chosen already

// The first of the largest of n values, which is then taken out.
static inline int64_t take_best(float* v, int64_t n, float& top) {
    int64_t at = 0;
    for (int64_t i = 1; i < n; i++)
        if (v[i] > v[at]) at = i;
    top = v[at];
    v[at] = -INFINITY;
    return at;
}

// Experts of all but the best groups are taken out of `choice`; `left` is a copy to work on, `best` has room for groups.
static void keep_groups(float* choice, float* left, float* best, int64_t groups, int64_t size, int64_t kept, int64_t of) {
    for (int64_t g = 0; g < groups; g++) {
        float top;
        best[g] = 0;
        for (int64_t i = 0; i < of; i++) take_best(left + g * size, size, top), best[g] += top;
        best[g] = best[g] > LOWEST ? best[g] : LOWEST;
    }
    for (float top; kept--;) take_best(best, groups, top);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = g * size; best[g] != -INFINITY && i < (g + 1) * size; i++) choice[i] = -INFINITY;
}

template <class T> static void route_row(const Op& o, const T* x, float* scratch, int32_t* ids, float* weights) {
    const int64_t H = o.n[0], E = o.n[2], K = o.n[3], groups = o.n[4], flags = o.n[7];
    const float *w = (const float*)o.p[1], *bias = (const float*)o.p[2];
    float *score = scratch, *choice = scratch + E, *left = scratch + 2 * E, *best = scratch + 3 * E, top = -INFINITY;
    for (int64_t e = 0; e < E; e++) {
        VF sum = set1(0.0f);
        PX_EACH(i, H, sum = fma(L(x), L(w + e * H), sum);)
        score[e] = flags & BIASED_LOGITS && bias ? hsum(sum) + bias[e] : hsum(sum);
        top = score[e] > top ? score[e] : top;
    }
    if (flags & SOFTMAX) {
        float total = 0;
        PX_EACH(i, E, S(score, vexp(sub(L(score), set1(top))));)
        for (int64_t e = 0; e < E; e++) total += score[e];
        PX_EACH(i, E, S(score, div(L(score), set1(total)));)
    } else
        PX_EACH(i, E, S(score, div(set1(1.0f), add(set1(1.0f), vexp(sub(set1(0.0f), L(score))))));)
    for (int64_t e = 0; e < E; e++) {
        const float v = bias && !(flags & BIASED_LOGITS) ? score[e] + bias[e] : score[e];
        choice[e] = left[e] = v > LOWEST ? v : LOWEST;  // of NaN too: an expert is chosen once
    }
    if (o.n[5] < groups) keep_groups(choice, left, best, groups, E / groups, o.n[5], o.n[6]);
    float total = 1e-20f;
    for (int64_t k = 0; k < K; k++) {
        ids[k] = (int32_t)take_best(choice, E, top);
        weights[k] = score[ids[k]];
        total += weights[k];
    }
    for (int64_t k = 0; k < K; k++) weights[k] = (flags & RENORMALISE ? weights[k] / total : weights[k]) * o.f[0];
}

template <class T> static void route(const Op& o, const Context& c) {
    const int64_t M = c.rows(o), E = o.n[2], K = o.n[3], count = M * K;
    const Plan plan(o.p[4], E, count);
    int64_t from, to;
    c.share(M, from, to);
    float* room = (float*)scratch(4 * E * sizeof(float));
    for (int64_t r = from; r < to; r++)
        route_row(o, (const T*)o.p[0] + r * o.n[1], room, plan.ids + r * K, (float*)o.p[3] + r * K);
    c.barrier();
    if (c.id) return;
    int32_t* next = (int32_t*)room;
    memset(next, 0, E * 4);
    for (int64_t i = 0; i < count; i++) next[plan.ids[i]]++;
    plan.starts[0] = 0;
    for (int64_t e = 0; e < E; e++) {
        plan.starts[e + 1] = plan.starts[e] + next[e];
        next[e] = plan.starts[e];
    }
    for (int64_t i = 0; i < count; i++) {
        plan.rows[i] = next[plan.ids[i]]++;
        plan.pairs[plan.rows[i]] = (int32_t)i;
    }
}

// As LINEAR, whose fields the first seven are; mult = top_k. `each` pairs share a row of x, which is then by token; at 0,
// x is sorted as the result is.
template <class T> static void experts(const Op& o, const Context& c) {
    typedef Panel<T> P;
    const int64_t K = o.n[0], tiles = (o.n[1] + 31) / 32, E = o.n[7], each = (int64_t)o.f[0];
    const Plan plan(o.p[3], E, c.rows(o));
    const int64_t lda = row_stride<P>(K), block = block_rows<P>(K);
    int64_t blocks = 0;
    for (int64_t e = 0; e < E; e++) blocks += (plan.starts[e + 1] - plan.starts[e] + block - 1) / block;
    const int64_t run = run_tiles(tiles, blocks, c), runs = (tiles + run - 1) / run;
    P* a = (P*)scratch(block * lda * sizeof(P));
    int64_t held = -1, e = 0, before = 0;  // `before`: blocks of the experts before e
    int configured = 0;
    for (int64_t item; (item = c.take()) < blocks * runs;) {
        const int64_t b = item / runs, t = item % runs * run;
        for (int64_t n; b >= before + (n = (plan.starts[e + 1] - plan.starts[e] + block - 1) / block); e++) before += n;
        const int64_t r0 = plan.starts[e] + (b - before) * block, left = plan.starts[e + 1] - r0;
        const int64_t rows = left < block ? left : block;
        if (b != held)
            fill<T>(a, lda, rows, o.n[6], K, [&](int64_t r) {
                return (const T*)o.p[0] + (each ? plan.pairs[r0 + r] / each : r0 + r) * o.n[2];
            });
        held = b;
        Op mine = o;
        mine.p[1] = (T*)o.p[1] + e * tiles * 32 * K;
        if (o.p[2]) mine.p[2] = (float*)o.p[2] + e * tiles * 32;
        mine.p[3] = o.p[4];
        columns_of<T>(mine, a, lda, t, t + run < tiles ? t + run : tiles, r0, rows, configured);
    }
    release(configured);
}

template <class T> static void sum_pairs(const Op& o, const Context& c) {
    const int64_t M = c.rows(o), H = o.n[0], K = o.n[1];
    const Plan plan(o.p[2], o.n[2], M * K);
    int64_t from, to;
    c.share(M, from, to);
    for (int64_t r = from; r < to; r++) {
        const float* weights = (const float*)o.p[1] + r * K;
        const int32_t* rows = plan.rows + r * K;
        PX_EACH(i, H, VF total = set1(0.0f);
                for (int64_t k = 0; k < K; k++) total = fma(L((const T*)o.p[0] + rows[k] * H), set1(weights[k]), total);
                S((T*)o.p[3] + r * H, total);)
    }
}
