// Sampling as backend/sampling.py defines it, one row per thread at a time. Sums run in rank order in double, so a token
// may differ from the host's where a probability falls on a boundary to the last bit.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "small.h"

static inline uint32_t mix(uint32_t h) {  // murmur3's finaliser (Appleby, public domain)
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
}

static inline float gumbel(uint32_t start, int32_t id) {
    float u = ((float)(mix(start ^ (uint32_t)id) >> 9) + 0.5f) * 0x1p-23f;
    return -logf(-logf(u));
}

struct Candidates {
    const float* z;  // [V]
    std::vector<int32_t> ids;

    bool before(int32_t a, int32_t b) const { return z[a] > z[b] || (z[a] == z[b] && a < b); }

    // Puts the first n ranks in front, in order; the first `sorted` of them are so already.
    void rank(size_t sorted, size_t n) {
        auto less = [this](int32_t a, int32_t b) { return before(a, b); };
        if (n < ids.size()) std::nth_element(ids.begin() + sorted, ids.begin() + n, ids.end(), less);
        std::sort(ids.begin() + sorted, ids.begin() + n, less);
    }

    // Keeps what top_k, then top_p and min_p of its softmax leave.
    void narrow(int32_t k, float top_p, float min_p) {
        if (k > 0 && (size_t)k < ids.size()) rank(0, k), ids.resize(k);
        size_t sorted = std::min<size_t>(ids.size(), 256);
        rank(0, sorted);
        const float top = z[ids[0]];
        double total = 0, before = 0;
        for (int32_t id : ids) total += expf(z[id] - top);
        size_t keep = 0;
        for (; keep < ids.size(); keep++) {
            if (keep == sorted) sorted = std::min(ids.size(), sorted * 8), rank(keep, sorted);
            double p = expf(z[ids[keep]] - top) / total;
            if (keep && (before >= top_p || p < min_p / total)) break;
            before += p;
        }
        ids.resize(keep);
    }
};

static int32_t sample_row(const Samples& a, int64_t s) {
    const float* x = a.logits + s * a.V;
    const float temperature = a.temperature[s];
    const uint32_t* mask = a.mask ? (const uint32_t*)a.mask + s * ((a.V + 31) / 32) : nullptr;
    if (temperature == 0 && !mask) return argmax_row(x, a.V);
    static thread_local std::vector<float> z;
    static thread_local Candidates c;
    z.resize(a.V), c.z = z.data(), c.ids.clear();
    for (int64_t i = 0; i < a.V; i++) {
        z[i] = temperature == 0 ? x[i] : x[i] / temperature;
        if (!mask || mask[i / 32] >> (i % 32) & 1) c.ids.push_back((int32_t)i);
    }
    if (c.ids.empty()) return -1;
    const bool narrowed = temperature != 0 && (a.top_k[s] > 0 || a.top_p[s] < 1 || a.min_p[s] > 0);
    if (narrowed) c.narrow(a.top_k[s], a.top_p[s], a.min_p[s]);
    const uint32_t start = mix(mix((uint32_t)a.seed[s]) ^ (uint32_t)a.position[s]);
    const float most = 16.7f;  // no noise is larger: -log(-log(1 - 2^-24)) is 16.64
    float best = -INFINITY;
    int32_t chosen = c.ids[0];
    for (int32_t id : c.ids) {
        if (z[id] + most < best) continue;
        float score = temperature == 0 ? z[id] : z[id] + gumbel(start, id);
        if (score > best || (score == best && id < chosen)) best = score, chosen = id;
    }
    return chosen;
}
