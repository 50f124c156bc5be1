// The loops of BEV pooling for vectors of B bytes; reference.py defines what they give.
#pragma once

#include "vectors.h"

#include <algorithm>

#if defined(__x86_64__)
#define EDGEKIT_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace edgekit {

constexpr int kCountBits = 16;
constexpr int kTile = 64;       // cells that are summed before they are stored
constexpr int kMostLanes = 10;  // vectors of channels that are kept in registers

struct Run {
    uint32_t depth, pixel, rows;  // rows: camera << 16 | number of them
};

struct PoolJob {
    const int32_t* starts;  // [cells + 1]
    const Run* runs;
    const float* depth;     // [cam, D, h, w]
    const float* features;  // [cam, h, w, channels]
    const uint8_t* used;    // [cam]
    float* out;             // [channels, cells], or [cells, channels] where `last`
    int64_t cells;
    int width, channels;
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

// Channels at[0..K) (each a vector of them) of one cell's sum, to `sum`. The order of additions is that of the runs.
template <int B, int K>
EDGEKIT_INLINE void sum_cell(const PoolJob& j, const Run* run, const Run* end, const int* at, float* sum) {
    using F = typename V<B>::F;
    F total[K];
    for (int k = 0; k < K; k++) total[k] = F{};
    for (; run != end; run++) {
        if (!j.used[run->rows >> kCountBits]) continue;
        const float* weight = j.depth + run->depth;
        const float* feature = j.features + int64_t(run->pixel) * j.channels;
        const ptrdiff_t step = ptrdiff_t(j.width) * j.channels;
        for (int n = int(run->rows & ((1u << kCountBits) - 1)); n > 0; n--, weight += j.width, feature += step) {
            const F w = F{} + *weight;
            for (int k = 0; k < K; k++) total[k] = total[k] + w * load<F>(feature + at[k]);
        }
    }
    for (int k = 0; k < K; k++) store(sum + at[k], total[k]);
}

template <int B>
EDGEKIT_INLINE void sum_channels(const PoolJob& j, const Run* run, const Run* end, const int* at, int lanes, float* sum) {
    switch (lanes) {
#define EDGEKIT_LANE_COUNT(K) case K: return sum_cell<B, K>(j, run, end, at, sum);
        EDGEKIT_LANE_COUNT(1) EDGEKIT_LANE_COUNT(2) EDGEKIT_LANE_COUNT(3) EDGEKIT_LANE_COUNT(4) EDGEKIT_LANE_COUNT(5)
        EDGEKIT_LANE_COUNT(6) EDGEKIT_LANE_COUNT(7) EDGEKIT_LANE_COUNT(8) EDGEKIT_LANE_COUNT(9) EDGEKIT_LANE_COUNT(10)
#undef EDGEKIT_LANE_COUNT
    }
}

// The sums of the `count` cells from `cell` on, which lie in `tile` [count, channels], to channels-first memory.
template <int B>
EDGEKIT_INLINE void store_planes(const PoolJob& j, int64_t cell, int count, const float* tile) {
    using F = typename V<B>::F;
    constexpr int N = V<B>::kFloats;
    alignas(64) float block[N * kTile];
    int c = 0;
    if (count == kTile) {
        for (; c + N <= j.channels; c += N) {
            for (int i = 0; i < kTile; i += N) {
                F v[N];
                for (int k = 0; k < N; k++) v[k] = load<F>(tile + (i + k) * j.channels + c);
                transpose<B>(v);
                for (int k = 0; k < N; k++) store(block + k * kTile + i, v[k]);
            }
            for (int k = 0; k < N; k++) {
                float* out = j.out + (c + k) * j.cells + cell;
                if (j.stream)
                    for (int i = 0; i < kTile; i += N) store_through<B>(out + i, load<F>(block + k * kTile + i));
                else
                    for (int i = 0; i < kTile; i += N) store(out + i, load<F>(block + k * kTile + i));
            }
        }
    }
    for (; c < j.channels; c++)
        for (int i = 0; i < count; i++) j.out[c * j.cells + cell + i] = tile[i * j.channels + c];
}

// Cells [first, first + count), count <= kTile. `tile`: [kTile, channels] to work in.
template <int B>
EDGEKIT_INLINE void pool_tile(const PoolJob& j, int64_t first, int count, float* tile) {
    constexpr int N = V<B>::kFloats;
    float* sums = j.last ? j.out + first * j.channels : tile;
    for (int i = 0; i < count; i++, sums += j.channels) {
        const Run *run = j.runs + j.starts[first + i], *end = j.runs + j.starts[first + i + 1];
        if (run == end) {
            std::memset(sums, 0, sizeof(float) * j.channels);
            continue;
        }
        int c = 0;
        while (c < j.channels) {  // the last vector reaches back over channels that are done: the same sums again
            int at[kMostLanes], lanes = 0;
            for (; lanes < kMostLanes && c < j.channels; lanes++, c += N) at[lanes] = std::min(c, j.channels - N);
            sum_channels<B>(j, run, end, at, lanes, sums);
        }
    }
    if (!j.last) store_planes<B>(j, first, count, tile);
}

EDGEKIT_LANES(void, pool_tile, (const PoolJob& j, int64_t first, int count, float* tile), (j, first, count, tile))
#if defined(__x86_64__)
EDGEKIT_AVX512 inline void pool_tile_widest(const PoolJob& j, int64_t first, int count, float* tile) {
    pool_tile<64>(j, first, count, tile);
}
#endif

// For fewer channels than a vector of 16 bytes has.
inline void pool_tile_scalar(const PoolJob& j, int64_t first, int count, float*) {
    for (int i = 0; i < count; i++)
        for (int c = 0; c < j.channels; c++) {
            float total = 0;
            for (int32_t r = j.starts[first + i]; r < j.starts[first + i + 1]; r++) {
                const Run& run = j.runs[r];
                if (!j.used[run.rows >> kCountBits]) continue;
                for (int k = 0; k < int(run.rows & ((1u << kCountBits) - 1)); k++)
                    total += j.depth[run.depth + int64_t(k) * j.width] *
                             j.features[(run.pixel + int64_t(k) * j.width) * j.channels + c];
            }
            j.out[j.last ? (first + i) * j.channels + c : c * j.cells + first + i] = total;
        }
}

}  // namespace edgekit
