// The interpreter: one parallel region for a whole program, a barrier after each op. Compiled once per instruction set.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "gemm.h"
#include "latent.h"
#include "moe.h"
#include "sample.h"
#include "small.h"

template <class T> static void execute(const Op& o, const Context& c) {
    switch (o.kind) {
        case EMBED: return embed<T>(o, c);
        case LINEAR: return linear<T>(o, c);
        case ADD: return add_rows<T>(o, c);
        case NORM: return norm<T>(o, c);
        case ADD_NORM: return add_norm<T>(o, c);
        case ROPE: return rope<T>(o, c);
        case ATTEND: return attend<T>(o, c);
        case GATED: return gated<T>(o, c);
        case LAST: return last<T>(o, c);
        case ARGMAX: return argmax(o, c);
        case ROUTE: return route<T>(o, c);
        case EXPERTS: return experts<T>(o, c);
        case SUM: return sum_pairs<T>(o, c);
        case LATENT: return latent<T>(o, c);
        case HEADS: return heads<T>(o, c);
        case CAP: return cap(o, c);
    }
}

extern "C" __attribute__((visibility("default"))) int px_init() {
#if PX_AMX
    const long request_permission = 0x1023, tile_data = 18;  // arch_prctl: the tiles' state is off until asked for
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 0;
#endif
    return 1;
}

extern "C" __attribute__((visibility("default"))) void px_run(const Op* ops, int32_t count, const Header* header) {
    Shared shared;
#pragma omp parallel num_threads(header->threads)
    {
        Context c{header, omp_get_thread_num(), omp_get_num_threads(), &shared};
        for (int32_t i = 0; i < count; i++) {
            if (ops[i].flags & F32)
                execute<float>(ops[i], c);
            else
                execute<bf16>(ops[i], c);
            c.barrier();
        }
    }
}

extern "C" __attribute__((visibility("default"))) void px_sample(const Samples* samples, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t s = 0; s < samples->S; s++) samples->out[s] = sample_row(*samples, s);
}
