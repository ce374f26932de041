// What one thread of a run knows: its number, the shared work counter and barrier, and its scratch memory.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdlib>

#include "px.h"
#include "vec.h"

struct Shared {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};
    alignas(64) std::atomic<int> next{0};
};

static thread_local char* scratch_memory = nullptr;
static thread_local size_t scratch_size = 0;

// At least `bytes` of this thread's memory, aligned to 64; the previous contents and pointer are lost.
static inline char* scratch(size_t bytes) {
    if (bytes > scratch_size) {
        free(scratch_memory);
        scratch_size = (bytes + 4095) / 4096 * 4096;
        scratch_memory = (char*)aligned_alloc(4096, scratch_size);
        if (!scratch_memory) abort();
    }
    return scratch_memory;
}

struct Context {
    const Header* h;
    int id, count;
    Shared* shared;

    int take() const { return shared->next.fetch_add(1, std::memory_order_relaxed); }  // the next work item

    // Every thread arrives before any leaves; the work counter is then zero. Spins about 30 us, then yields.
    void barrier() const {
        if (count == 1) return shared->next.store(0, std::memory_order_relaxed);
        int phase = shared->phase.load(std::memory_order_relaxed);
        if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            shared->arrived.store(0, std::memory_order_relaxed);
            shared->next.store(0, std::memory_order_relaxed);
            shared->phase.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; shared->phase.load(std::memory_order_acquire) == phase; spins++)
            if (spins < 1000)
                _mm_pause();
            else
                sched_yield();
    }
    int64_t rows(const Op& o) const { return (o.flags & SEQS ? h->S : h->T) * o.mult; }

    // This thread's contiguous share of n items.
    void share(int64_t n, int64_t& from, int64_t& to) const { from = n * id / count, to = n * (id + 1) / count; }
};
