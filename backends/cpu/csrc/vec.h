// One vector of float32 and what the kernels need of it, for AVX2 (8 lanes) and AVX-512 (16 lanes).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

#if PX_AVX512
typedef __m512 VF;
static constexpr int W = 16;
static inline VF ld(const float* p) { return _mm512_loadu_ps(p); }
static inline VF ld(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline void st(float* p, VF x) { _mm512_storeu_ps(p, x); }
static inline __m256i round_bf16(VF x) {
    if (!_mm512_fpclass_ps_mask(x, 0x20)) return (__m256i)_mm512_cvtneps_pbh(x);  // which would flush a denormal
    __m512i u = _mm512_castps_si512(x), lsb = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
static inline void st(bf16* p, VF x) { _mm256_storeu_si256((__m256i*)p, round_bf16(x)); }
static inline VF set1(float x) { return _mm512_set1_ps(x); }
static inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
static inline VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
static inline VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
static inline VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
static inline VF div(VF a, VF b) { return _mm512_div_ps(a, b); }
static inline VF vmax(VF a, VF b) { return _mm512_max_ps(a, b); }
static inline VF vmin(VF a, VF b) { return _mm512_min_ps(a, b); }
static inline VF vround(VF a) { return _mm512_roundscale_ps(a, 8); }
static inline VF scale2(VF y, VF n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
static inline VF zero_below(VF y, VF x, VF lo) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, lo, _CMP_LT_OQ), _mm512_setzero_ps());
}
static inline __m256 low_half(VF v) { return _mm512_castps512_ps256(v); }
static inline __m256 high_half(VF v) { return _mm512_extractf32x8_ps(v, 1); }
static inline __m256 fold_add(VF v) { return _mm256_add_ps(low_half(v), high_half(v)); }
static inline __m256 fold_max(VF v) { return _mm256_max_ps(low_half(v), high_half(v)); }
#else
typedef __m256 VF;
static constexpr int W = 8;
static inline VF ld(const float* p) { return _mm256_loadu_ps(p); }
static inline VF ld(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline void st(float* p, VF x) { _mm256_storeu_ps(p, x); }
static inline void st(bf16* p, VF x) {
    __m256i u = _mm256_castps_si256(x), lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    __m128i out = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128((__m128i*)p, out);
}
static inline VF set1(float x) { return _mm256_set1_ps(x); }
static inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
static inline VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
static inline VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
static inline VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
static inline VF div(VF a, VF b) { return _mm256_div_ps(a, b); }
static inline VF vmax(VF a, VF b) { return _mm256_max_ps(a, b); }
static inline VF vmin(VF a, VF b) { return _mm256_min_ps(a, b); }
static inline VF vround(VF a) { return _mm256_round_ps(a, 8); }
static inline VF scale2(VF y, VF n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
static inline VF zero_below(VF y, VF x, VF lo) { return _mm256_andnot_ps(_mm256_cmp_ps(x, lo, _CMP_LT_OQ), y); }
static inline __m256 fold_add(VF v) { return v; }
static inline __m256 fold_max(VF v) { return v; }
#endif

static inline float hsum(VF v) {
    __m256 y = fold_add(v);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float hmax(VF v) {
    __m256 y = fold_max(v);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// The first n < W elements, the rest zero; and their store.
template <class T> static inline VF ldn(const T* p, int n) {
    T t[W] = {};
    memcpy(t, p, n * sizeof(T));
    return ld(t);
}
template <class T> static inline void stn(T* p, VF v, int n) {
    T t[W];
    st(t, v);
    memcpy(p, t, n * sizeof(T));
}
// Calls f(i, load, store) for every vector of n elements; the last one may be partial.
#define PX_EACH(i, n, body)                                          \
    {                                                                \
        int64_t i = 0;                                               \
        for (; i + W <= (n); i += W) {                               \
            auto L = [&](const auto* p) { return ld(p + i); };       \
            auto S = [&](auto* p, VF v) { st(p + i, v); };           \
            (void)L, (void)S;                                        \
            body                                                     \
        }                                                            \
        if (i < (n)) {                                               \
            int left = (int)((n)-i);                                 \
            auto L = [&](const auto* p) { return ldn(p + i, left); }; \
            auto S = [&](auto* p, VF v) { stn(p + i, v, left); };    \
            (void)L, (void)S;                                        \
            body                                                     \
        }                                                            \
    }

// exp with an error below 2 ulp; exactly 1 at 0, exactly 0 below -87.3, clamped above 88, NaN stays NaN.
// Range reduction and coefficients: Cephes expf (Moshier, public domain).
static inline VF vexp(VF x) {
    const VF lo = set1(-87.3f);
    VF c = vmax(lo, vmin(set1(88.0f), x));
    VF n = vround(mul(c, set1(1.44269504088896341f)));
    VF r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    VF p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    VF y = add(fma(p, mul(r, r), r), set1(1.0f));
    return zero_below(scale2(y, n), x, lo);
}
static inline VF vgate(VF x, VF slope) { return div(x, add(set1(1.0f), vexp(sub(set1(0.0f), slope)))); }
static inline VF vsilu(VF x) { return vgate(x, x); }
static inline VF vgelu(VF x) {  // by its tanh form: x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
    return vgate(x, mul(x, fma(mul(x, x), set1(1.5957691216057308f * 0.044715f), set1(1.5957691216057308f))));
}
static inline VF vtanh(VF x) {  // Cephes: near zero the difference of exps loses digits
    x = vmin(set1(9.0f), vmax(set1(-9.0f), x));
    VF z = mul(x, x), p = set1(-5.70498872745e-3f), lo = set1(0.625f), size = vmax(x, sub(set1(0.0f), x));
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    VF near = fma(mul(p, z), x, x), far = sub(set1(1.0f), div(set1(2.0f), add(vexp(add(x, x)), set1(1.0f))));
    return add(zero_below(far, size, lo), sub(near, zero_below(near, size, lo)));
}
