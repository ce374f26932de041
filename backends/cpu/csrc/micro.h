// The inner product of every kernel: c[MR rows][NV vectors] (+)= a[MR][k] * b[k][columns].
//
// b comes in `segments` of `depth` k each (so that a cache's pages need no copy), rows `ldb` columns long: float32
// [depth][ldb], or bf16 in pairs [depth/2][ldb][2]. Each c is one chain over k ascending, whatever MR and NV are.
// AHEAD cache lines are prefetched per row of b, spread over the work so that they never queue: those at the same place
// in `ahead`.
#pragma once
#include "vec.h"

#if PX_AVX512
static constexpr int MAX_ROWS = 12;
typedef bf16 Panel16;  // a in bf16 mode is used as it is: vdpbf16ps multiplies pairs
#else
static constexpr int MAX_ROWS = 6;
typedef float Panel16;  // a in bf16 mode is widened once per block
#endif
static constexpr int V16 = 16 / W;  // vectors in 16 columns

template <class T> struct PanelOf { typedef float type; };
template <> struct PanelOf<bf16> { typedef Panel16 type; };
template <class T> using Panel = typename PanelOf<T>::type;

struct Segments {
    const void *const *b, *const *ahead;
    int count, depth;
    int64_t ldb;
};

template <int MR, int NV, int AHEAD>
static inline void micro(const float* a, int64_t lda, const float*, Segments s, int column, float* c, int64_t ldc,
                         bool accumulate) {
    VF acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? ld(c + i * ldc + j * W) : set1(0.0f);
    for (int g = 0; g < s.count; g++, a += s.depth) {
        [[maybe_unused]] const int64_t shift = AHEAD ? (const char*)s.ahead[g] - (const char*)s.b[g] : 0;
        const float* b = (const float*)s.b[g] + column;
        for (int k = 0; k < s.depth; k++, b += s.ldb) {
            for (int j = 0; j < AHEAD; j++) _mm_prefetch((const char*)(b + j * 16) + shift, _MM_HINT_T0);
            for (int j = 0; j < NV; j++) {
                VF x = ld(b + j * W);
                for (int i = 0; i < MR; i++) acc[i][j] = fma(set1(a[i * lda + k]), x, acc[i][j]);
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) st(c + i * ldc + j * W, acc[i][j]);
}

#if PX_AVX512
template <int MR, int NV, int AHEAD>
static inline void micro(const bf16* a, int64_t lda, const bf16*, Segments s, int column, float* c, int64_t ldc,
                         bool accumulate) {
    VF acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? ld(c + i * ldc + j * W) : set1(0.0f);
    for (int g = 0; g < s.count; g++, a += s.depth) {
        [[maybe_unused]] const int64_t shift = AHEAD ? (const char*)s.ahead[g] - (const char*)s.b[g] : 0;
        const bf16* b = (const bf16*)s.b[g] + 2 * column;
        for (int k = 0; k < s.depth; k += 2, b += 2 * s.ldb) {
            for (int j = 0; j < AHEAD; j++) _mm_prefetch((const char*)(b + j * 32) + shift, _MM_HINT_T0);
            __m512bh x[NV];
            for (int j = 0; j < NV; j++) x[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
            for (int i = 0; i < MR; i++) {
                int32_t pair;
                memcpy(&pair, a + i * lda + k, 4);
                for (int j = 0; j < NV; j++)
                    acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)_mm512_set1_epi32(pair), x[j]);
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) st(c + i * ldc + j * W, acc[i][j]);
}
#else
template <int MR, int NV, int AHEAD>
static inline void micro(const float* a, int64_t lda, const bf16*, Segments s, int column, float* c, int64_t ldc,
                         bool accumulate) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    VF acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = accumulate ? ld(c + i * ldc + j * W) : set1(0.0f);
    for (int g = 0; g < s.count; g++, a += s.depth) {
        [[maybe_unused]] const int64_t shift = AHEAD ? (const char*)s.ahead[g] - (const char*)s.b[g] : 0;
        const bf16* b = (const bf16*)s.b[g] + 2 * column;
        for (int k = 0; k < s.depth; k += 2, b += 2 * s.ldb) {
            for (int j = 0; j < AHEAD; j++) _mm_prefetch((const char*)(b + j * 32) + shift, _MM_HINT_T0);
            VF x[NV];
            for (int j = 0; j < NV; j++)
                x[j] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)(b + j * 16)), 16));
            for (int i = 0; i < MR; i++) {
                VF y = set1(a[i * lda + k]);
                for (int j = 0; j < NV; j++) acc[i][j] = fma(y, x[j], acc[i][j]);
            }
            for (int j = 0; j < NV; j++)
                x[j] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(b + j * 16)), high));
            for (int i = 0; i < MR; i++) {
                VF y = set1(a[i * lda + k + 1]);
                for (int j = 0; j < NV; j++) acc[i][j] = fma(y, x[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) st(c + i * ldc + j * W, acc[i][j]);
}
#endif

// `rows` <= MAX_ROWS of 16 columns. T is the type of b.
template <class T, int NV, int AHEAD, int MR = MAX_ROWS>
static inline void micro_rows(int rows, const Panel<T>* a, int64_t lda, Segments s, int column, float* c, int64_t ldc,
                              bool accumulate) {
    if (rows == MR) return micro<MR, NV, AHEAD>(a, lda, (const T*)nullptr, s, column, c, ldc, accumulate);
    if constexpr (MR > 1) micro_rows<T, NV, AHEAD, MR - 1>(rows, a, lda, s, column, c, ldc, accumulate);
}

// The same for few rows over vectors that lie apart: c[MR][NV vectors] = a[MR][depth] * b[j][depth], where b[j] points to
// the vector of k = 0 and b's rows are `ldb` columns long. Many vectors at once hide the latency of a chain; `ahead[j]`
// is what to read ahead beside b[j].
template <class T, int MR, int NV>
static inline void fan(const Panel<T>* a, int64_t lda, const T* const* b, const T* const* ahead, int64_t ldb, int depth,
                       float* c, int64_t ldc) {
    VF acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = set1(0.0f);
    if constexpr (sizeof(T) == 4) {
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < NV; j++) {
                if (j % V16 == 0) _mm_prefetch((const char*)(ahead[j] + k * ldb), _MM_HINT_T0);
                VF x = ld(b[j] + k * ldb);
                for (int i = 0; i < MR; i++) acc[i][j] = fma(set1(a[i * lda + k]), x, acc[i][j]);
            }
    } else {
        for (int k = 0; k < depth; k += 2)
            for (int j = 0; j < NV; j++) {
                if (j % V16 == 0) _mm_prefetch((const char*)(ahead[j] + k * ldb), _MM_HINT_T0);
#if PX_AVX512
                __m512bh x = (__m512bh)_mm512_loadu_si512(b[j] + k * ldb);
                for (int i = 0; i < MR; i++) {
                    int32_t pair;
                    memcpy(&pair, a + i * lda + k, 4);
                    acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)_mm512_set1_epi32(pair), x);
                }
#else
                __m256i x = _mm256_loadu_si256((const __m256i*)(b[j] + k * ldb));
                VF even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
                VF odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
                for (int i = 0; i < MR; i++) acc[i][j] = fma(set1(a[i * lda + k]), even, acc[i][j]);
                for (int i = 0; i < MR; i++) acc[i][j] = fma(set1(a[i * lda + k + 1]), odd, acc[i][j]);
#endif
            }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) st(c + i * ldc + j * W, acc[i][j]);
}

template <class T, int NV, int MR>
static inline void fan_rows(int rows, const Panel<T>* a, int64_t lda, const T* const* b, const T* const* ahead, int64_t ldb,
                            int depth, float* c, int64_t ldc) {
    if (rows == MR) return fan<T, MR, NV>(a, lda, b, ahead, ldb, depth, c, ldc);
    if constexpr (MR > 1) fan_rows<T, NV, MR - 1>(rows, a, lda, b, ahead, ldb, depth, c, ldc);
}

static inline void widen(const float* x, float* out, int64_t n) { memcpy(out, x, n * 4); }
static inline void widen(const bf16* x, bf16* out, int64_t n) { memcpy(out, x, n * 2); }
static inline void widen(const bf16* x, float* out, int64_t n) { PX_EACH(i, n, S(out, L(x));) }
