// The loops of BEV pooling for vectors of B bytes; reference.py defines what they give.
#pragma once

#include "bev_pool/blocks.h"
#include "vectors.h"

#if defined(__x86_64__)
#define EDGEKIT_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace edgekit {

constexpr int kAhead = 3;         // runs from the fetch of a weight to its use
constexpr int kMostVectors = 10;  // of channels, in registers

struct PoolJob {
    const BlockRun* runs;
    const Segment* segments;
    const float* depth;     // [cam, D, h, w]
    const float* features;  // [cam, h, w, channels]
    const uint8_t* used;    // [cam]
    float* out;             // [channels, cells], or [cells, channels] where `last`
    int64_t cells;
    int width, channels, into;  // into: as `cut` takes it
    bool last, stream;
};

// A whole vector past the caches; p is aligned to it. The line is not read before, and nothing useful goes for it.
template <int B>
EDGEKIT_INLINE void store_through(float* p, const typename V<B>::F& v) {
#if defined(__x86_64__)
    if constexpr (B == 64) asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<typename V<B>::F*>(p)) : "v"(v));
    else if constexpr (B == 32) asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<typename V<B>::F*>(p)) : "x"(v));
    else asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<typename V<B>::F*>(p)) : "x"(v));
#else
    store(p, v);
#endif
}

EDGEKIT_INLINE void store_fence() {
#if defined(__x86_64__)
    asm volatile("sfence" ::: "memory");
#endif
}

// Lanes of a and b in turn: their lower halves (a0 b0 a1 b1 ..), their upper halves.
#if defined(__clang__)
#define EDGEKIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EDGEKIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
template <int B>
EDGEKIT_INLINE void zip(const typename V<B>::F& a, const typename V<B>::F& b, typename V<B>::F& low,
                        typename V<B>::F& high) {
    using I [[maybe_unused]] = typename V<B>::I;
    if constexpr (B == 16) {
        low = EDGEKIT_SHUFFLE(a, b, 0, 4, 1, 5), high = EDGEKIT_SHUFFLE(a, b, 2, 6, 3, 7);
    } else if constexpr (B == 32) {
        low = EDGEKIT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11), high = EDGEKIT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
        low = EDGEKIT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        high = EDGEKIT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

// N vectors of N lanes become their columns.
template <int B>
EDGEKIT_INLINE void transpose(typename V<B>::F* v) {
    constexpr int N = V<B>::kFloats;
    typename V<B>::F w[N];
    for (int step = 1; step < N; step *= 4) {
        for (int i = 0; i < N / 2; i++) zip<B>(v[i], v[i + N / 2], w[2 * i], w[2 * i + 1]);
        if (2 * step == N) {
            for (int i = 0; i < N; i++) v[i] = w[i];
            break;
        }
        for (int i = 0; i < N / 2; i++) zip<B>(w[i], w[i + N / 2], v[2 * i], v[2 * i + 1]);
    }
}

// Adds a block's runs to its cells' sums [cells, channels]: K vectors of channels, from channel `c` on.
template <int B, int K>
EDGEKIT_INLINE void add_runs(const PoolJob& j, const Block& block, int c, float* sums) {
    using F = typename V<B>::F;
    constexpr int N = V<B>::kFloats;
    const ptrdiff_t channels = j.channels, width = j.width,  step = width * channels;
    const float *depth = j.depth, *features = j.features + c;
    const uint8_t* used = j.used;
    const BlockRun *at = j.runs + block.runs, *end = j.runs + block.runs_end;
    sums += c;
    for (; at != end; at++) {
        const Run run = at->run;
        if (!used[run.rows >> kCountBits]) continue;
        const float* weight = depth + run.depth;
        const float* feature = features + ptrdiff_t(run.pixel) * channels;
        float* sum = sums + ptrdiff_t(at->cell) * channels;
        F total[K];
        for (int k = 0; k < K; k++) total[k] = load<F>(sum + k * N);
        const float* ahead = depth + (at + kAhead < end ? at[kAhead] : *at).run.depth;
        for (int n = int(run.rows & ((1u << kCountBits) - 1)); n > 0; n--, weight += width, feature += step, ahead += width) {
            const F w = *weight - F{};
            __builtin_prefetch(ahead);
            for (int k = 0; k < K; k++) total[k] = total[k] + w * load<F>(feature + k * N);
        }
        for (int k = 0; k < K; k++) store(sum + k * N, total[k]);
    }
}

template <int B>
EDGEKIT_INLINE void add_channels(const PoolJob& j, const Block& block, int c, int vectors, float* sums) {
    switch (vectors) {
#define EDGEKIT_VECTORS(K) case K: return add_runs<B, K>(j, block, c, sums);
        EDGEKIT_VECTORS(1) EDGEKIT_VECTORS(2) EDGEKIT_VECTORS(3) EDGEKIT_VECTORS(4) EDGEKIT_VECTORS(5)
        EDGEKIT_VECTORS(6) EDGEKIT_VECTORS(7) EDGEKIT_VECTORS(8) EDGEKIT_VECTORS(9) EDGEKIT_VECTORS(10)
#undef EDGEKIT_VECTORS
    }
}

// The sums [count, channels] of the cells from `cell` on to channels-first memory.
template <int B>
EDGEKIT_INLINE void store_planes(const PoolJob& j, int64_t cell, int count, const float* sums) {
    using F = typename V<B>::F;
    constexpr int N = V<B>::kFloats;
    const ptrdiff_t channels = j.channels, cells = j.cells;
    const bool stream = j.stream;
    float* out = j.out + cell;
    const auto one = [&](int i) {
        for (ptrdiff_t c = 0; c < channels; c++) out[c * cells + i] = sums[i * channels + c];
    };
    const int before = int(kLine - (cell + j.into) % kLine) % kLine;  // cells before a line begins
    int i = 0;
    for (; i < std::min(before, count); i++) one(i);
    for (; i + kLine <= count; i += kLine) {
        int c = 0;
        for (; c + N <= channels; c += N) {
            F v[kLine];
            for (int k = 0; k < kLine; k++) v[k] = load<F>(sums + (i + k) * channels + c);
            for (int k = 0; k < kLine; k += N) transpose<B>(v + k);
            float* to = out + c * cells + i;
            for (int k = 0; k < N; k++, to += cells)
                for (int part = 0; part < kLine / N; part++)  // a whole line at once
                    if (stream) store_through<B>(to + part * N, v[part * N + k]);
                    else store(to + part * N, v[part * N + k]);
        }
        for (; c < channels; c++)
            for (int k = 0; k < kLine; k++) out[c * cells + i + k] = sums[(i + k) * channels + c];
    }
    for (; i < count; i++) one(i);
}

// Channels from `c` on, in vectors of B bytes and what is left in shorter ones.
template <int B>
EDGEKIT_INLINE void add_block(const PoolJob& j, const Block& block, int c, float* sums) {
    constexpr int N = V<B>::kFloats;
    for (int vectors; (vectors = std::min(kMostVectors, (j.channels - c) / N)) > 0; c += vectors * N)
        add_channels<B>(j, block, c, vectors, sums);
    if (c == j.channels) return;
    if constexpr (B > 16) return add_block<B / 2>(j, block, c, sums);
    for (int64_t r = block.runs; r < block.runs_end; r++) {
        const Run& run = j.runs[r].run;
        if (!j.used[run.rows >> kCountBits]) continue;
        for (int k = 0; k < int(run.rows & ((1u << kCountBits) - 1)); k++)
            for (int i = c; i < j.channels; i++)
                sums[int64_t(j.runs[r].cell) * j.channels + i] +=
                    j.depth[run.depth + int64_t(k) * j.width] *
                    j.features[(run.pixel + int64_t(k) * j.width) * j.channels + i];
    }
}

// One block of cells. `sums`: [cells of it, channels] to work in.
template <int B>
EDGEKIT_INLINE void pool_block(const PoolJob& j, const Block& block, float* sums) {
    std::memset(sums, 0, sizeof(float) * block.cells * j.channels);
    add_block<B>(j, block, 0, sums);
    for (int s = block.segments; s < block.segments_end; s++) {
        const Segment& g = j.segments[s];
        const float* from = sums + int64_t(g.local) * j.channels;
        if (j.last) std::memcpy(j.out + g.first * j.channels, from, sizeof(float) * g.count * j.channels);
        else store_planes<B>(j, g.first, g.count, from);
    }
    if (j.stream) store_fence();
}

EDGEKIT_LANES(void, pool_block, (const PoolJob& j, const Block& block, float* sums), (j, block, sums))
#if defined(__x86_64__)
EDGEKIT_AVX512 inline void pool_block_widest(const PoolJob& j, const Block& block, float* sums) {
    pool_block<64>(j, block, sums);
}
#endif

}  // namespace edgekit
