// The inner products of rows_isa.h for every instruction set of this CPU family, and the choice among them.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace edgekit {

// One kernel position's product for one group of output channels.
template <class T>
struct Operand;

template <>
struct Operand<float> {
    const float* features;  // [voxels, channels]
    const float* weights;   // [channels, group]
    float* sums;            // [tile, stride], at the group
    int channels, stride;
};

template <>
struct Operand<int8_t> {
    const int8_t* features;
    const int8_t* weights;   // [channels / 4, group, 4]
    int32_t* sums;
    int channels, stride;
    const int32_t* offset;  // [group]
};

// What becomes of sums: float32 ones hold the bias already, those of int8 are scaled first.
struct Finish {
    bool relu;
    const float *scale, *bias;         // int8 only
    const float* add;                  // residual, or null: float32
    const int8_t* add8;                // or int8 with its scale
    float add_scale, out_scale;
    float* out;                        // either of them
    int8_t* out8;
};

// What an instruction set's products look like from outside.
struct Lanes {
    const char* name;
    int width;        // channels of a vector
    int columns;      // vectors of a group at most
    bool unsigned_x;  // int8 inputs are used as x + 128, and offset takes 128 * sum(weights) off again
    bool fused;       // a * b + c rounds once
    void (*floats)(int, const Operand<float>&, const int32_t*, const uint8_t*, int);
    void (*bytes)(int, const Operand<int8_t>&, const int32_t*, const uint8_t*, int);
    void (*finish)(const Finish&, float*, int64_t, int64_t);
    void (*scaled)(const Finish&, const int32_t*, float*, int);
};

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
typedef int32_t I __attribute__((vector_size(64)));  // not __m512i, which GCC keeps in memory as it may alias
constexpr int kWidth = 16, kVectors = 32;
}  // namespace lanes_avx512
#define LOAD_F(p) _mm512_loadu_ps(p)
#define STORE_F(p, v) _mm512_storeu_ps(p, v)
#define SET_F(x) _mm512_set1_ps(x)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOAD_I(p) (I) _mm512_loadu_si512(p)
#define STORE_I(p, v) _mm512_storeu_si512(p, (__m512i)(v))
#define ADD_I(a, b) ((a) + (b))
#define SET_X(p) (I)(_mm512_set1_epi32(four(p)) ^ _mm512_set1_epi32(int32_t(0x80808080)))
#define DOT(c, x, w) (I) _mm512_dpbusd_epi32((__m512i)(c), (__m512i)(x), (__m512i)(w))
#include "sparse_conv/rows_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef LOAD_I
#undef STORE_I
#undef ADD_I
#undef SET_X
#undef DOT

#define LANES lanes_avx2
#define TARGET __attribute__((target("avx2,fma")))
namespace lanes_avx2 {
typedef __m256 F;
typedef int32_t I __attribute__((vector_size(32)));
constexpr int kWidth = 8, kVectors = 16;
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
#define LOAD_I(p) (I) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define STORE_I(p, v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)(v))
#define ADD_I(a, b) ((a) + (b))
#define SET_X(p) (I) _mm256_set1_epi32(four(p))
#define DOT(c, x, w) dot(c, x, w)
#include "sparse_conv/rows_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef LOAD_I
#undef STORE_I
#undef ADD_I
#undef SET_X
#undef DOT
#endif

#if defined(__aarch64__)
namespace lanes_neon {
typedef float32x4_t F;
typedef int32x4_t I;
constexpr int kWidth = 4, kVectors = 32;
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
#define LOAD_I(p) vld1q_s32(reinterpret_cast<const int32_t*>(p))
#define STORE_I(p, v) vst1q_s32(p, v)
#define ADD_I(a, b) vaddq_s32(a, b)
#define SET_X(p) vdupq_n_s32(four(p))
#define DOT(c, x, w) dot(c, x, w)
#include "sparse_conv/rows_isa.h"
#undef LANES
#undef TARGET
#undef DOT

#define LANES lanes_neon_dot
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
namespace lanes_neon_dot {
typedef float32x4_t F;
typedef int32x4_t I;
constexpr int kWidth = 4, kVectors = 32;
TARGET inline I dot(I c, I x, I w) {
    return vdotq_s32(c, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}
}  // namespace lanes_neon_dot
#define DOT(c, x, w) dot(c, x, w)
#include "sparse_conv/rows_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef LOAD_I
#undef STORE_I
#undef ADD_I
#undef SET_X
#undef DOT
#endif

// Vectors of the compiler, for other CPUs and as a second opinion in the tests.
#define LANES lanes_portable
#define TARGET
namespace lanes_portable {
typedef V<16>::F F;
typedef V<16>::I I;
constexpr int kWidth = 4, kVectors = 16;
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
#define LOAD_I(p) load<I>(p)
#define STORE_I(p, v) store(p, v)
#define ADD_I(a, b) ((a) + (b))
#define SET_X(p) I{four(p), four(p), four(p), four(p)}
#define DOT(c, x, w) dot(c, x, w)
#include "sparse_conv/rows_isa.h"
#undef LANES
#undef TARGET
#undef LOAD_F
#undef STORE_F
#undef SET_F
#undef FMA
#undef LOAD_I
#undef STORE_I
#undef ADD_I
#undef SET_X
#undef DOT

#if defined(__aarch64__)
inline bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif

// Those that this machine can run, best first.
inline std::vector<Lanes> all_lanes() {
    std::vector<Lanes> list;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        list.push_back({"avx512", 16, 4, true, true, lanes_avx512::pairs<float>, lanes_avx512::pairs<int8_t>,
                        lanes_avx512::finish, lanes_avx512::scaled});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        list.push_back({"avx2", 8, 2, false, true, lanes_avx2::pairs<float>, lanes_avx2::pairs<int8_t>,
                        lanes_avx2::finish, lanes_avx2::scaled});
#elif defined(__aarch64__)
    if (has_dot_products())
        list.push_back({"neon-dot", 4, 4, false, true, lanes_neon_dot::pairs<float>, lanes_neon_dot::pairs<int8_t>,
                        lanes_neon_dot::finish, lanes_neon_dot::scaled});
    list.push_back({"neon", 4, 4, false, true, lanes_neon::pairs<float>, lanes_neon::pairs<int8_t>,
                        lanes_neon::finish, lanes_neon::scaled});
#endif
    list.push_back({"portable", 4, 2, false, false, lanes_portable::pairs<float>, lanes_portable::pairs<int8_t>,
                        lanes_portable::finish, lanes_portable::scaled});
    return list;
}

}  // namespace edgekit
