// Roundings and functions of float32 that every CPU computes to the same bits (docs/native.md). In an unnamed namespace:
// every file compiles its own, for its own instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "payload.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace edgekit {
namespace {

// Nearest, ties to even. |x| < 2^31.
inline int32_t rne(float x) {
#if defined(__SSE2__)
    return _mm_cvtss_si32(_mm_set_ss(x));
#elif defined(__aarch64__)
    int32_t r;
    asm("fcvtns %w0, %s1" : "=r"(r) : "w"(x));
    return r;
#else
    return static_cast<int32_t>(std::lrintf(x));
#endif
}

inline int32_t clamp_int(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }
inline uint8_t sat8u(int32_t x) { return static_cast<uint8_t>(clamp_int(x, 0, 255)); }
inline int32_t sat16(int32_t x) { return clamp_int(x, -32768, 32767); }

// e^x = 2^r * 2^f with x log2 e = r + f, |f| <= 1/2, and a polynomial of f. x is held in [-87, 88]; NaN stays NaN.
constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;
constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then are
constexpr float kPower[5] = {1.32695341e-3f, 9.67129227e-3f, 5.55071086e-2f, 0.240222469f, 0.693147004f};

inline float exp_f32(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float m = std::fmaf(x, kLog2e, kRounds);
    const float f = std::fmaf(x, kLog2eRest, std::fmaf(x, kLog2e, kRounds - m));
    float p = kPower[0];
    for (int i = 1; i < 5; ++i) p = std::fmaf(p, f, kPower[i]);
    p = std::fmaf(p, f, 1.0f);
    uint32_t bits;
    std::memcpy(&bits, &m, 4);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// 1 - 2 / (e^2x + 1)
inline float tanh_f32(float x) { return 1.0f - 2.0f / (exp_f32(x + x) + 1.0f); }

// Abramowitz and Stegun 7.1.26, |error| < 1.5e-7.
inline float erf_f32(float x) {
    const float a = x < 0.0f ? -x : x;
    const float t = 1.0f / std::fmaf(0.3275911f, a, 1.0f);
    float p = 1.061405429f;
    p = std::fmaf(p, t, -1.453152027f);
    p = std::fmaf(p, t, 1.421413741f);
    p = std::fmaf(p, t, -0.284496736f);
    p = std::fmaf(p, t, 0.254829592f);
    const float y = 1.0f - p * t * exp_f32(-(a * a));
    return x < 0.0f ? -y : y;
}

// min and max as SSE has them: the second one where they do not compare.
inline float max_f32(float a, float b) { return a > b ? a : b; }
inline float min_f32(float a, float b) { return a < b ? a : b; }

inline float activate(Act act, float a, float p0, float p1) {
    switch (act) {
        case Act::kRelu: return max_f32(a, 0.0f);
        case Act::kClip: return min_f32(max_f32(a, p0), p1);
        case Act::kLeakyRelu: return a >= 0.0f ? a : a * p0;
        case Act::kSigmoid: return sigmoid_f32(a);
        case Act::kSilu: return a / (1.0f + exp_f32(-a));
        case Act::kHardSwish: return a * min_f32(max_f32(a + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
        case Act::kHardSigmoid: return min_f32(max_f32(a * p0 + p1, 0.0f), 1.0f);
        case Act::kTanh: return tanh_f32(a);
        case Act::kGelu: return 0.5f * a * (1.0f + erf_f32(a * 0.70710678f));
        case Act::kExp: return exp_f32(a);
        default: return a;
    }
}

}  // namespace
}  // namespace edgekit
