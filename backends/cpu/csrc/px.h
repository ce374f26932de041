// The C interface of the CPU kernels: a step is an array of Op, run by px_run over one Header.
//
// Pointers are borrowed for the duration of a call. Activations and the KV cache are bf16 (uint16_t) or float32, as flag
// F32 of the op says; strides and counts are in elements; rows are T * mult, or S * mult when flag SEQS is set.
// A token's result has the same bits in every batch: each output is one accumulation chain in a fixed order.
#pragma once
#include <cstdint>

enum Kind : int32_t { EMBED, LINEAR, ADD, NORM, ADD_NORM, ROPE, ATTEND, GATED, LAST, ARGMAX, ROUTE, EXPERTS, SUM, CAP, LATENT, HEADS };
enum Flag : int32_t { F32 = 1, SEQS = 2 };
enum LinearMode : int64_t { PLAIN, SPLIT_GATE, FUSED_SILU, FUSED_GELU };  // all but the first: gate and up interleaved by 16 columns
enum RouteFlag : int64_t { SOFTMAX = 1, RENORMALISE = 2, BIASED_LOGITS = 4 };
enum Gate : int64_t { SILU, GELU, CLAMPED };

// kind      p[]                                    n[]                                              f[]
// EMBED     table [V,H], out                       H
// LINEAR    x, w, bias f32 or null, out            K (padded), N, x stride, out stride, mode, out is f32, K of x
// ADD       x, y, out                              H, x stride, y stride
// NORM      x, w f32, out                          width, x stride, inner (rows per x row, mult = inner)   eps
// ADD_NORM  x, residual, w f32, out, sum           H                                                eps
// ROPE      q, k, table f32 [pos,D], q out, k out  Hq, Hk, D, q stride, k stride
// ATTEND    q, k, v, kv, sinks f32 [Hq] or null, out   Hq, Hk, D, q, k, v stride, page, window or 0, group   scale, softcap or 0
// GATED     x [.,2F], out [.,F]                    F, x stride, Gate                                alpha, limit of CLAMPED
// LAST      x, out [S,H]                           H, x stride
// ARGMAX    x f32 [rows,V], out i32 [rows]         V
// ROUTE     x, w f32 [E,H], bias f32 or null, weights f32 [T,K], plan   H, x stride, E, K, groups, top_groups,
//                                                  group_best, RouteFlag                            scale
// EXPERTS   x, w and bias [E] as of LINEAR, plan, out [P,N]   the first seven of LINEAR, E        pairs to a row of x, 0 if sorted
// CAP       x f32 [rows,V], out f32                V                                                softcap
// SUM       parts [P,H], weights, plan, out [T,H]  H, K, E
// LATENT    q, c, norm f32 [R], table f32 [pos,rope], absorbed [T,H,R+rope], out [T,R+rope]   H, nope, rope, R, q stride,
//                                                  c stride, floor_scale                            eps, attn_scale
// HEADS     x, w [H] as of LINEAR, null, out       the first seven of LINEAR, H
//
// The plan of ROUTE: csrc/moe.h. w of LINEAR: bf16 [N/32][K/2][32][2], f32 [N/32][K][32], both zero-padded. kv: [pages][Hk][2][page*D], where k is
// bf16 [D/2][page][2] or f32 [D][page], and v is bf16 [page/2][D][2] or f32 [page][D].
struct Op {
    int32_t kind, flags;
    int64_t mult;
    void* p[6];
    int64_t n[9];
    float f[2];
};

// Arrays as in HostBatch, int32; `slots` [G,T] and `pages` [G,S,page_stride] are those of all groups. threads >= 1.
struct Header {
    int32_t T, S, threads, page_stride;
    const int32_t *tokens, *positions, *slots, *cu_q, *kv_len, *pages, *last;
};

// As SampleBatch, for S rows of logits; mask may be null. `out` is -1 for a row whose mask allows nothing.
struct Samples {
    int64_t S, V;
    const float *logits, *temperature, *top_p, *min_p;
    const int32_t *top_k, *seed, *position, *mask;
    int32_t* out;
};

extern "C" {
int px_init();  // 1 when the processor and the system can run this library; call once before px_run
void px_run(const Op* ops, int32_t count, const Header* header);
void px_sample(const Samples* samples, int32_t threads);
}
