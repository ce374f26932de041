// The row-wise verbs. Rows are shared out statically; each row is done by one thread in one fixed order.
#pragma once
#include "context.h"

template <class T> static void embed(const Op& o, const Context& c) {
    int64_t from, to, H = o.n[0];
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++)
        memcpy((T*)o.p[1] + r * H, (const T*)o.p[0] + c.h->tokens[r] * H, H * sizeof(T));
}

template <class T> static void last(const Op& o, const Context& c) {
    int64_t from, to, H = o.n[0];
    c.share(c.rows(o), from, to);
    for (int64_t s = from; s < to; s++)
        memcpy((T*)o.p[1] + s * H, (const T*)o.p[0] + c.h->last[s] * o.n[1], H * sizeof(T));
}

template <class T> static void add_rows(const Op& o, const Context& c) {
    int64_t from, to, H = o.n[0];
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) {
        const T *x = (const T*)o.p[0] + r * o.n[1], *y = (const T*)o.p[1] + r * o.n[2];
        T* out = (T*)o.p[2] + r * H;
        PX_EACH(i, H, S(out, add(L(x), L(y)));)
    }
}

template <class T> static void norm_row(const T* x, const float* w, T* out, int64_t n, float eps) {
    VF sum = set1(0.0f);
    PX_EACH(i, n, VF v = L(x); sum = fma(v, v, sum);)
    VF scale = set1(1.0f / sqrtf(hsum(sum) / (float)n + eps));
    PX_EACH(i, n, S(out, mul(mul(L(x), scale), L(w)));)
}

template <class T> static void norm(const Op& o, const Context& c) {
    int64_t from, to, n = o.n[0], inner = o.n[2];
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++)
        norm_row((const T*)o.p[0] + r / inner * o.n[1] + r % inner * n, (const float*)o.p[1], (T*)o.p[2] + r * n, n, o.f[0]);
}

template <class T> static void add_norm(const Op& o, const Context& c) {
    int64_t from, to, n = o.n[0];
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) {
        const T *x = (const T*)o.p[0] + r * n, *y = (const T*)o.p[1] + r * n;
        T* sum = (T*)o.p[4] + r * n;
        PX_EACH(i, n, S(sum, add(L(y), L(x)));)
        norm_row(sum, (const float*)o.p[2], (T*)o.p[3] + r * n, n, o.f[0]);
    }
}

template <class T> static void rotate(const T* x, T* out, const float* table, int64_t half) {
    PX_EACH(i, half, VF a = L(x); VF b = L(x + half); VF cs = L(table); VF sn = L(table + half);
            S(out, sub(mul(a, cs), mul(b, sn))); S(out + half, fma(b, cs, mul(a, sn)));)
}

template <class T> static void rope(const Op& o, const Context& c) {
    const int64_t Hq = o.n[0], Hk = o.n[1], D = o.n[2];
    int64_t from, to;
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) {
        const float* table = (const float*)o.p[2] + c.h->positions[r] * D;
        for (int64_t h = 0; h < Hq; h++)
            rotate((const T*)o.p[0] + r * o.n[3] + h * D, (T*)o.p[3] + (r * Hq + h) * D, table, D / 2);
        for (int64_t h = 0; h < Hk; h++)
            rotate((const T*)o.p[1] + r * o.n[4] + h * D, (T*)o.p[4] + (r * Hk + h) * D, table, D / 2);
    }
}

template <class T> static void gated(const Op& o, const Context& c) {
    int64_t from, to, F = o.n[0];
    const VF alpha = set1(o.f[0]), most = set1(o.f[1]), least = set1(-o.f[1]);
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) {
        const T* x = (const T*)o.p[0] + r * o.n[1];
        T* out = (T*)o.p[1] + r * F;
        if (o.n[2] == GELU)
            PX_EACH(i, F, S(out, mul(vgelu(L(x)), L(x + F)));)
        else if (o.n[2] == CLAMPED)
            PX_EACH(i, F, VF g = vmin(L(x), most); VF u = vmax(vmin(L(x + F), most), least);
                    S(out, mul(vgate(g, mul(alpha, g)), add(u, set1(1.0f))));)
        else
            PX_EACH(i, F, S(out, mul(vsilu(L(x)), L(x + F)));)
    }
}

static void cap(const Op& o, const Context& c) {
    int64_t from, to, V = o.n[0];
    c.share(c.rows(o), from, to);
    const VF most = set1(o.f[0]);
    for (int64_t r = from; r < to; r++) {
        const float* x = (const float*)o.p[0] + r * V;
        float* out = (float*)o.p[1] + r * V;
        PX_EACH(i, V, S(out, mul(most, vtanh(div(L(x), most))));)
    }
}

// The lowest index of the largest value; a NaN counts as one of the largest.
static inline int32_t argmax_row(const float* x, int64_t n) {
    VF top = set1(-INFINITY);
    int64_t i = 0;
    for (; i + W <= n; i += W) top = vmax(ld(x + i), top);
    float m = hmax(top);
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    for (i = 0; i < n; i++)
        if (!(x[i] < m)) return (int32_t)i;
    return 0;
}

static void argmax(const Op& o, const Context& c) {
    int64_t from, to;
    c.share(c.rows(o), from, to);
    for (int64_t r = from; r < to; r++) ((int32_t*)o.p[1])[r] = argmax_row((const float*)o.p[0] + r * o.n[0], o.n[0]);
}
