// The mean of what an output pixel covers, exactly: rows are summed with their weights in 32 bits over the
// whole width, then columns, and one division rounds (reference.py). Sums of columns take 64 bits where 31 do
// not hold them.
#pragma once

#include "finish.h"

#include <algorithm>

namespace edgekit {
namespace {

// One axis as the tables have it: weight [n][most].
struct FilterTaps {
    std::vector<int32_t> start, weight;
    int most, total;
};

// One axis: output pixel d sums `count[d]` source pixels from start[d] on, times weight[d * most + k].
struct Filter {
    std::vector<int32_t> start, count, weight;
    int most;
    uint32_t total;

    Filter(FilterTaps taps, int n, int source)
        : start(std::move(taps.start)), weight(std::move(taps.weight)), most(taps.most), total(uint32_t(taps.total)) {
        const int sum = taps.total;
        check(int(start.size()) == n && weight.size() == size_t(n) * most && sum >= 1, "letterbox filter");
        for (int d = 0; d < n; d++) {
            int64_t seen = 0;
            int used = 0;
            for (int k = 0; k < most; k++) {
                const int w = weight[size_t(d) * most + k];
                check(w >= 0, "letterbox filter weight");
                seen += w;
                if (w > 0) used = k + 1;
            }
            check(seen == sum && start[d] >= 0 && start[d] + used <= source, "letterbox filter range");
            count.push_back(used);
        }
    }
};

// (s * 2^(bits + 1) + t) / 2 t for a weighted sum s of bytes whose weights make t.
struct Mean {
    int bits, shift = 0;
    uint64_t total, factor = 0;
    bool narrow;  // numerators fit 31 bits: a product and a shift divide them exactly

    Mean(int bits, uint64_t total) : bits(bits), total(total), narrow((((255ull << bits) * 2 + 1) * total) >> 31 == 0) {
        if (!narrow) return;
        int log2 = 0;
        while ((1ull << log2) < 2 * total) log2++;
        shift = 31 + log2;
        // 1 / 2 t rounded up: too large by less than 2^-31 of itself, which no numerator below 2^31 shows
        factor = (1ull << shift) / (2 * total) + 1;
    }
};

// All `taps` of every output pixel, most of which are used: a count of its own would be mispredicted at each.
// Sums behind the last are read, times 0.
template <class Sum>
EDGEKIT_INLINE Sum mean_sum(const Filter& f, const uint32_t* sums, int step, int x, int taps) {
    const uint32_t* from = sums + size_t(f.start[x]) * step;
    const int32_t* weight = f.weight.data() + size_t(x) * f.most;
    Sum s = 0;
    for (int k = 0; k < taps; k++) s += Sum(weight[k]) * from[size_t(k) * step];
    return s;
}

template <class T>
EDGEKIT_INLINE void mean_narrow(const Filter& f, const Mean& mean, const uint32_t* sums, int step, int taps, T* dst) {
    const int n = int(f.start.size()), up = mean.bits + 1, shift = mean.shift;
    const uint64_t total = mean.total, factor = mean.factor;
    for (int x = 0; x < n; x++)
        dst[x] = T((((mean_sum<uint32_t>(f, sums, step, x, taps) << up) + total) * factor) >> shift);
}

template <class T>
void mean_columns(const Filter& f, const Mean& mean, const uint32_t* sums, int step, T* dst) {
    if (mean.narrow) {
        switch (f.most) {
            case 2: return mean_narrow(f, mean, sums, step, 2, dst);
            case 3: return mean_narrow(f, mean, sums, step, 3, dst);
            case 4: return mean_narrow(f, mean, sums, step, 4, dst);
            case 5: return mean_narrow(f, mean, sums, step, 5, dst);
            default: return mean_narrow(f, mean, sums, step, f.most, dst);
        }
    }
    for (int x = 0; x < int(f.start.size()); x++)
        dst[x] = T(((mean_sum<uint64_t>(f, sums, step, x, f.most) << (mean.bits + 1)) + mean.total) / (2 * mean.total));
}

EDGEKIT_INLINE void add_row(const uint8_t* row, uint32_t weight, int n, uint32_t* sums) {
    for (int i = 0; i < n; i++) sums[i] += weight * row[i];
}

void add_row_portable(const uint8_t* row, uint32_t weight, int n, uint32_t* sums) { add_row(row, weight, n, sums); }
#if EDGEKIT_HAS_AVX2
EDGEKIT_TARGET_AVX2 void add_row_avx2(const uint8_t* row, uint32_t weight, int n, uint32_t* sums) {
    add_row(row, weight, n, sums);
}
#endif

// Weighted sums of the rows that output row y covers, n bytes each.
inline void sum_rows(Isa isa, const Filter& f, int y, const uint8_t* plane, ptrdiff_t stride, int n, uint32_t* sums) {
    std::fill(sums, sums + n, 0u);
    for (int k = 0; k < f.count[y]; k++) {
        const uint8_t* row = plane + (f.start[y] + k) * stride;
        const uint32_t weight = uint32_t(f.weight[size_t(y) * f.most + k]);
#if EDGEKIT_HAS_AVX2
        if (isa == Isa::avx2) {
            add_row_avx2(row, weight, n, sums);
            continue;
        }
#endif
        (void)isa;
        add_row_portable(row, weight, n, sums);
    }
}

}  // namespace
}  // namespace edgekit
