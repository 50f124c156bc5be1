// The loops of the decoder that carry its time, for vectors of B bytes; reference.py defines what they give.
#pragma once

#include "../vectors.h"

#include <cmath>
#include <limits>

namespace edgekit {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
constexpr float kLn2Hi32 = 0.693359375f, kLn2Lo32 = -2.12194440e-4f;
constexpr double kInverseFactorials[14] = {1.0,           1.0,            1.0 / 2,         1.0 / 6,         1.0 / 24,
                                           1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                           1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// e^x. Adding 1.5 * 2^52 rounds to the nearest whole number, ties to even, and leaves it in the low bits.
template <int B>
EDGEKIT_INLINE typename V<B>::D exp_of(const typename V<B>::D& x) {
    using D = typename V<B>::D;
    using U = typename V<B>::U;
    constexpr double kRound = 6755399441055744.0;
    const D shifted = x * kLog2e + kRound, n = shifted - kRound;
    const D r = (x - n * kLn2Hi) - n * kLn2Lo, zero{};
    D p = zero + kInverseFactorials[13];
    for (int k = 12; k >= 0; k--) p = p * r + kInverseFactorials[k];
    const D result = p * (D)(((U)shifted + 1023) << 52);
    const D edge = x > zero ? zero + kInf : (x < zero ? zero : x);
    return ((x <= zero + 708.0) & (x >= zero - 708.0)) ? result : edge;
}

// In place; n is a multiple of 8.
template <int B>
EDGEKIT_INLINE void exp_all(double* x, int n) {
    for (int i = 0; i < n; i += V<B>::kDoubles) store(x + i, exp_of<B>(load<typename V<B>::D>(x + i)));
}

// e^x of x <= 0 in float32: 0 below -87, so that no result is subnormal; NaN stays.
template <int B>
EDGEKIT_INLINE typename V<B>::F exp32_of(const typename V<B>::F& x) {
    using F = typename V<B>::F;
    using I = typename V<B>::I;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23, as above
    const F zero{}, shifted = x * float(kLog2e) + kRound, n = shifted - kRound;
    const F r = (x - n * kLn2Hi32) - n * kLn2Lo32;
    F p = zero + float(kInverseFactorials[7]);
    for (int k = 6; k >= 0; k--) p = p * r + float(kInverseFactorials[k]);
    typename V<B>::W bits = (((typename V<B>::W)shifted + 127) << 23);
    const F result = p * (F)bits;
    const I tiny = x < zero - 87.0f;
    return tiny ? zero : result;
}

// Mean bin under softmax, of 8 cells: logits [bins][8] -> mean [8]. `work`: [bins * 8]. One NaN makes it NaN.
template <int B>
EDGEKIT_INLINE void expected_bins(const float* logits, int bins, float* work, float* mean) {
    using F = typename V<B>::F;
    for (int i = 0; i < 8; i += V<B>::kFloats) {
        F top = F{} - float(kInf), total{}, sum{};
        for (int k = 0; k < bins; k++) {
            const F value = load<F>(logits + 8 * k + i);
            top = value > top ? value : top;
        }
        // exponentials first: they do not wait for each other as the sums below do
        for (int k = 0; k < bins; k++) store(work + 8 * k + i, exp32_of<B>(load<F>(logits + 8 * k + i) - top));
        for (int k = 0; k < bins; k++) {
            const F e = load<F>(work + 8 * k + i);
            total = total + e;
            sum = sum + e * float(k);
        }
        store(mean + i, sum / total);
    }
}

// Whether one of 16 values is at least `low`.
template <int B>
EDGEKIT_INLINE bool any_above(const float* p, float low) {
    typename V<B>::I hit{};
    for (int i = 0; i < 16; i += V<B>::kFloats) hit |= load<typename V<B>::F>(p + i) >= low;
    return any<B>(hit);
}

// Best class of n neighbouring cells whose classes are planes `step` bytes apart, the first of equals: value and
// index [n]; NaN never wins, -inf and 0 where all are NaN. Four planes a pass: four streams keep the memory busier
// than one.
template <int B>
EDGEKIT_INLINE void best_of_tile(const char* p, ptrdiff_t step, int count, int n, float* value, int32_t* index) {
    using F = typename V<B>::F;
    using I = typename V<B>::I;
    for (int i = 0; i < n; i++) value[i] = -float(kInf), index[i] = 0;
    int c = 0;
    for (; c + 4 <= count; c += 4, p += 4 * step) {
        int i = 0;
        for (; i + 16 <= n; i += 16) {
            for (int j = i; j < i + 16; j += V<B>::kFloats) {
                F best = load<F>(value + j);
                I at = load<I>(index + j);
                for (int k = 0; k < 4; k++) {
                    const F v = load<F>(p + k * step + 4 * j);
                    const I up = v > best;
                    best = up ? v : best, at = up ? I{} + (c + k) : at;
                }
                store(value + j, best), store(index + j, at);
            }
        }
        for (; i < n; i++)
            for (int k = 0; k < 4; k++) {
                const float v = load<float>(p + k * step + 4 * i);
                if (v > value[i]) value[i] = v, index[i] = c + k;
            }
    }
    for (; c < count; c++, p += step)
        for (int i = 0; i < n; i++) {
            const float v = load<float>(p + 4 * i);
            if (v > value[i]) value[i] = v, index[i] = c;
        }
}

// Best class of 8 neighbouring cells whose classes lie `step` bytes apart, the first of equals: value and index [8].
template <int B>
EDGEKIT_INLINE void best_of_planes(const char* p, ptrdiff_t step, int count, float* value, int32_t* index) {
    using F = typename V<B>::F;
    using I = typename V<B>::I;
    constexpr int N = V<B>::kFloats;
    F best[8 / N];
    I at[8 / N];
    for (int j = 0; j < 8 / N; j++) best[j] = F{} - float(kInf), at[j] = I{};
    for (int c = 0; c < count; c++, p += step)
        for (int j = 0; j < 8 / N; j++) {
            const F v = load<F>(p + j * B);
            const I up = v > best[j];
            best[j] = up ? v : best[j], at[j] = up ? I{} + c : at[j];
        }
    for (int j = 0; j < 8 / N; j++) store(value + j * N, best[j]), store(index + j * N, at[j]);
}

// Best class of one cell whose classes are neighbours, the first of equals; -inf and 0 where all are NaN.
template <int B>
EDGEKIT_INLINE float best_of_row(const float* p, int count, int32_t* index) {
    using F = typename V<B>::F;
    using I = typename V<B>::I;
    constexpr int N = V<B>::kFloats;
    F best = F{} - float(kInf);
    I at{}, here{};
    for (int k = 0; k < N; k++) here[k] = k;
    int c = 0;
    for (; c + N <= count; c += N, here += N) {
        const F v = load<F>(p + c);
        const I up = v > best;
        best = up ? v : best, at = up ? here : at;
    }
    float value = best[0];
    *index = at[0];
    for (int k = 1; k < N; k++)
        if (best[k] > value || (best[k] == value && at[k] < *index)) value = best[k], *index = at[k];
    for (; c < count; c++)
        if (p[c] > value) value = p[c], *index = c;
    return value;
}

EDGEKIT_LANES(void, exp_all, (double* x, int n), (x, n))
EDGEKIT_LANES(void, expected_bins, (const float* logits, int bins, float* work, float* mean),
              (logits, bins, work, mean))
EDGEKIT_LANES(bool, any_above, (const float* p, float low), (p, low))
EDGEKIT_LANES(void, best_of_tile, (const char* p, ptrdiff_t step, int count, int n, float* value, int32_t* index),
              (p, step, count, n, value, index))
EDGEKIT_LANES(void, best_of_planes, (const char* p, ptrdiff_t step, int count, float* value, int32_t* index),
              (p, step, count, value, index))
EDGEKIT_LANES(float, best_of_row, (const float* p, int count, int32_t* index), (p, count, index))

}  // namespace edgekit
