// The inner loops of tiles_isa.h for every instruction set of this CPU family, and the choice among them.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace edgekit {
namespace block {

constexpr int kBlock = 8;  // filters that share what is kept

// A tile: the kept weights of some filters, and some vectors of pixels. A pixel is 4 bytes: a float, or one byte of
// each of four channels.
struct Run {
    const uint32_t* x;       // the planes
    const int32_t* offsets;  // of the pixel that a kept weight meets, for the output's first pixel
    const void* w;           // [count][filters] floats, or [count][filters][4] int8
    int count, rows;         // kept weights; filters that there are
    int64_t at[8];           // output pixel at which each vector begins
};

struct FloatEnd {
    const float* bias;
    bool relu;
    float* const* out;  // of each filter
};

// code = zero + round(min(max(sum * scale, low), high))
struct ByteEnd {
    const int32_t* bias;
    const float* scale;
    float low, high;
    int32_t zero;
    uint8_t* const* out;
};

struct Lanes {
    const char* name;
    int width;      // pixels of a vector
    int wide, most;  // vectors of a tile of 8 filters, of 1 filter
    bool flipped;   // bytes are used as x - 128
    bool fused;     // a * b + c rounds once
    void (*floats)(const Run&, const FloatEnd&, int, int);
    void (*bytes)(const Run&, const ByteEnd&, int);
    void (*pick)(const uint32_t*, int64_t, int, int, int, uint32_t*, int64_t);
};

// Four rows of bytes, pixel by pixel; `flip` (0 or 128) is what they are changed by.
inline void interleave(const uint8_t* const* rows, int64_t n, uint8_t flip, uint32_t* out) {
    typedef uint8_t B __attribute__((vector_size(16)));
    typedef uint16_t H __attribute__((vector_size(16)));
    constexpr B low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
    constexpr H low2 = {0, 8, 1, 9, 2, 10, 3, 11}, high2 = low2 + 4;
    const B change = B{} + flip;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        B v[4];
        for (int k = 0; k < 4; k++) v[k] = load<B>(rows[k] + i) ^ change;
        const H a = (H)__builtin_shuffle(v[0], v[1], low), b = (H)__builtin_shuffle(v[2], v[3], low);
        const H c = (H)__builtin_shuffle(v[0], v[1], high), d = (H)__builtin_shuffle(v[2], v[3], high);
        store(out + i, __builtin_shuffle(a, b, low2));
        store(out + i + 4, __builtin_shuffle(a, b, high2));
        store(out + i + 8, __builtin_shuffle(c, d, low2));
        store(out + i + 12, __builtin_shuffle(c, d, high2));
    }
    for (; i < n; i++) {
        const uint8_t pixel[4] = {uint8_t(rows[0][i] ^ flip), uint8_t(rows[1][i] ^ flip), uint8_t(rows[2][i] ^ flip),
                                  uint8_t(rows[3][i] ^ flip)};
        std::memcpy(out + i, pixel, 4);
    }
}

inline int32_t four(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define LANES lanes_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))
namespace lanes_avx512 {
typedef __m512 F;
typedef int32_t I __attribute__((vector_size(64)));
constexpr int kWidth = 16, kVectors = 32, kFilters = 8, kWide = 3;
}  // namespace lanes_avx512
#define LOAD_F(p) _mm512_loadu_ps(p)
#define STORE_F(p, v) _mm512_storeu_ps(p, v)
#define SET_F(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MAX_F(a, b) ((a) > (b) ? (a) : (b))  // GCC warns of its own header for _mm512_max_ps
#define LOAD_I(p) (I) _mm512_loadu_si512(p)
#define STORE_I(p, v) _mm512_storeu_si512(p, (__m512i)(v))
#define SET_I(x) (I) _mm512_set1_epi32(x)
#define SET_W(p) (I) _mm512_set1_epi32(four(p))
#define DOT(c, x, w) (I) _mm512_dpbusd_epi32((__m512i)(c), (__m512i)(x), (__m512i)(w))
#include "block_conv/tiles_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef MAX_F
#undef LOAD_I
#undef STORE_I
#undef SET_I
#undef SET_W
#undef DOT

#define LANES lanes_avx2
#define TARGET __attribute__((target("avx2,fma")))
namespace lanes_avx2 {
typedef __m256 F;
typedef int32_t I __attribute__((vector_size(32)));
constexpr int kWidth = 8, kVectors = 16, kFilters = 4, kWide = 3;
// Pairs of products fit 16 bits: |x| <= 128, |w| <= 127.
TARGET inline I dot(I c, I x, I w) {
    const __m256i a = (__m256i)x, products = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8((__m256i)w, a));
    return c + (I)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
}  // namespace lanes_avx2
#define LOAD_F(p) _mm256_loadu_ps(p)
#define STORE_F(p, v) _mm256_storeu_ps(p, v)
#define SET_F(x) _mm256_set1_ps(x)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MAX_F(a, b) _mm256_max_ps(a, b)
#define LOAD_I(p) (I) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define STORE_I(p, v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)(v))
#define SET_I(x) (I) _mm256_set1_epi32(x)
#define SET_W(p) (I) _mm256_set1_epi32(four(p))
#define DOT(c, x, w) dot(c, x, w)
#include "block_conv/tiles_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef MAX_F
#undef LOAD_I
#undef STORE_I
#undef SET_I
#undef SET_W
#undef DOT
#endif

#if defined(__aarch64__)
namespace lanes_neon {
typedef float32x4_t F;
typedef int32x4_t I;
constexpr int kWidth = 4, kVectors = 32, kFilters = 8, kWide = 3;
inline I dot(I c, I x, I w) {
    const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(w);
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
    return vaddq_s32(c, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
}  // namespace lanes_neon
#define LANES lanes_neon
#define TARGET
#define LOAD_F(p) vld1q_f32(p)
#define STORE_F(p, v) vst1q_f32(p, v)
#define SET_F(x) vdupq_n_f32(x)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define MAX_F(a, b) vmaxq_f32(a, b)
#define LOAD_I(p) vld1q_s32(reinterpret_cast<const int32_t*>(p))
#define STORE_I(p, v) vst1q_s32(p, v)
#define SET_I(x) vdupq_n_s32(x)
#define SET_W(p) vdupq_n_s32(four(p))
#define DOT(c, x, w) dot(c, x, w)
#include "block_conv/tiles_isa.h"
#undef LANES
#undef TARGET
#undef DOT

#define LANES lanes_neon_dot
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
namespace lanes_neon_dot {
typedef float32x4_t F;
typedef int32x4_t I;
constexpr int kWidth = 4, kVectors = 32, kFilters = 8, kWide = 3;
TARGET inline I dot(I c, I x, I w) {
    return vdotq_s32(c, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}
}  // namespace lanes_neon_dot
#define DOT(c, x, w) dot(c, x, w)
#include "block_conv/tiles_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef MAX_F
#undef LOAD_I
#undef STORE_I
#undef SET_I
#undef SET_W
#undef DOT
#endif

// Vectors of the compiler, for other CPUs and as a second opinion in the tests.
#define LANES lanes_portable
#define TARGET
namespace lanes_portable {
typedef V<16>::F F;
typedef V<16>::I I;
constexpr int kWidth = 4, kVectors = 16, kFilters = 4, kWide = 3;
inline I dot(I c, I x, I w) {
    for (int shift = 24; shift >= 0; shift -= 8)  // each of the four bytes, sign extended
        c += ((x << shift) >> 24) * ((w << shift) >> 24);
    return c;
}
}  // namespace lanes_portable
#define LOAD_F(p) load<F>(p)
#define STORE_F(p, v) store(p, v)
#define SET_F(x) F{x, x, x, x}
#define FMA(a, b, c) ((c) + (a) * (b))
#define MAX_F(a, b) ((a) > (b) ? (a) : (b))
#define LOAD_I(p) load<I>(p)
#define STORE_I(p, v) store(p, v)
#define SET_I(x) I{x, x, x, x}
#define SET_W(p) I{four(p), four(p), four(p), four(p)}
#define DOT(c, x, w) dot(c, x, w)
#include "block_conv/tiles_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef MAX_F
#undef LOAD_I
#undef STORE_I
#undef SET_I
#undef SET_W
#undef DOT

#define EDGEKIT_LANES_OF(label, ns, flipped, fused)                                                            \
    Lanes{label, ns::kWidth, ns::kWide, ns::kMost, flipped, fused, ns::floats, ns::bytes, ns::pick}

// Those that this machine can run, best first.
inline std::vector<Lanes> all_lanes() {
    std::vector<Lanes> list;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        list.push_back(EDGEKIT_LANES_OF("avx512", lanes_avx512, false, true));
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        list.push_back(EDGEKIT_LANES_OF("avx2", lanes_avx2, true, true));
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & (1ul << 20))  // HWCAP_ASIMDDP
        list.push_back(EDGEKIT_LANES_OF("neon-dot", lanes_neon_dot, true, true));
#endif
    list.push_back(EDGEKIT_LANES_OF("neon", lanes_neon, true, true));
#endif
    list.push_back(EDGEKIT_LANES_OF("portable", lanes_portable, true, false));
    return list;
}
#undef EDGEKIT_LANES_OF

}  // namespace block
}  // namespace edgekit
