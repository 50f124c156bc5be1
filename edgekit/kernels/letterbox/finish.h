// The last step of a row: 8-bit levels to the values of the network's input, and their layout.
//
// What each level becomes is in a table (reference.py: value_table). Where vector arithmetic gives every
// entry of that table it is used instead of looking up; the constructor tries it on all of them.
#pragma once

#include "../isa.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define EDGEKIT_HAS_AVX2 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define EDGEKIT_HAS_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define EDGEKIT_INLINE inline __attribute__((always_inline))
#else
#define EDGEKIT_INLINE inline
#endif
#define EDGEKIT_TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))

namespace edgekit {
namespace {

enum class Out { f32, f16, u8 };

// x = (level - mean) / std, in three ways that agree on the 256 levels of each channel:
// `plain`, mean 0 and std 1; `refined`, by the reciprocal and one step of correction; `divided`.
enum class Arithmetic { plain, refined, divided };

// 8-bit values: the levels themselves, shifted by a constant, or by table.
enum class Bytes { shifted, looked_up };

struct Finish {
    Out type;
    Arithmetic arithmetic;
    Bytes bytes;
    uint8_t shift;
    const uint8_t* table;  // [3][256] values
    const float *mean, *std, *inverse;  // per value of a row: [3][w], or [w][3] if interleaved
};

// Asks for lines that will be written.
inline void own(uint8_t* p, int bytes) {
#if defined(__GNUC__)
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 1);
#endif
}

template <class T>
void look_up(const uint8_t* levels, int from, int n, const T* table, T* dst) {
    for (int i = from; i < n; i++) dst[i] = table[levels[i]];
}

// Channels in turn: the table of value i is the (i mod 3)-th.
template <class T>
void look_up_interleaved(const uint8_t* levels, int from, int n, const T* table, T* dst) {
    for (int i = from; i < n; i++) dst[i] = table[256 * (i % 3) + levels[i]];
}

template <class T>
void look_up_row(const Finish& f, const uint8_t* levels, int from, int n, int channel, bool interleaved, void* dst) {
    const T* table = reinterpret_cast<const T*>(f.table);
    if (interleaved) look_up_interleaved(levels, from, n, table, static_cast<T*>(dst));
    else look_up(levels, from, n, table + 256 * channel, static_cast<T*>(dst));
}

inline void shift_bytes(const uint8_t* levels, int n, uint8_t shift, uint8_t* dst) {
    for (int i = 0; i < n; i++) dst[i] = uint8_t(levels[i] + shift);
}

inline void interleave_portable(const uint8_t* const planes[3], uint8_t shift, int from, int n, uint8_t* dst) {
    for (int i = from; i < n; i++)
        for (int c = 0; c < 3; c++) dst[3 * i + c] = uint8_t(planes[c][i] + shift);
}

// Does one step of correction after the product with the reciprocal give the quotient of every level?
inline bool refined_is_exact(float mean, float std) {
    const float inverse = 1.0f / std;
    for (int v = 0; v < 256; v++) {
        const float x = float(v) - mean, q = x * inverse;
        const float r = std::fma(std::fma(-q, std, x), inverse, q);
        const float want = x / std;
        if (std::memcmp(&r, &want, 4) != 0) return false;
    }
    return true;
}

#if EDGEKIT_HAS_AVX2
EDGEKIT_TARGET_AVX2 EDGEKIT_INLINE __m256 normalise8(const Finish& f, __m128i levels, int i) {
    const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(levels));
    if (f.arithmetic == Arithmetic::plain) return v;
    const __m256 x = _mm256_sub_ps(v, _mm256_loadu_ps(f.mean + i)), std = _mm256_loadu_ps(f.std + i);
    if (f.arithmetic == Arithmetic::divided) return _mm256_div_ps(x, std);
    const __m256 inverse = _mm256_loadu_ps(f.inverse + i), q = _mm256_mul_ps(x, inverse);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(q, std, x), inverse, q);
}

// `f` by value: its kind is settled outside of the loop.
EDGEKIT_TARGET_AVX2 EDGEKIT_INLINE int floats_avx2(const Finish f, const uint8_t* levels, int n, void* dst) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + i));
        const __m256 a = normalise8(f, v, i), b = normalise8(f, _mm_srli_si128(v, 8), i + 8);
        if (f.type == Out::f32) {
            _mm256_storeu_ps(static_cast<float*>(dst) + i, a);
            _mm256_storeu_ps(static_cast<float*>(dst) + i + 8, b);
        } else {
            __m128i* out = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(dst) + i);
            _mm_storeu_si128(out, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
            _mm_storeu_si128(out + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
        }
    }
    return i;
}

EDGEKIT_TARGET_AVX2 int finish_avx2(const Finish& f, const uint8_t* levels, int n, void* dst) {
    Finish g = f;
    if (g.type == Out::f32 && g.arithmetic == Arithmetic::plain) {
        g.type = Out::f32, g.arithmetic = Arithmetic::plain;
        return floats_avx2(g, levels, n, dst);
    }
    if (g.type == Out::f32 && g.arithmetic == Arithmetic::refined) {
        g.type = Out::f32, g.arithmetic = Arithmetic::refined;
        return floats_avx2(g, levels, n, dst);
    }
    return floats_avx2(g, levels, n, dst);
}

// 256 entries by 16 shuffles: `rest` counts down from the level, and saturated addition sets bit 7 of all
// but the 16 values that the shuffle at hand is for, which makes it give 0.
EDGEKIT_TARGET_AVX2 int look_up_avx2(const uint8_t* table, const uint8_t* levels, int n, uint8_t* dst) {
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i rest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels + i));
        __m256i found = _mm256_setzero_si256();
        for (int k = 0; k < 16; k++) {
            const __m256i part = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k)));
            found = _mm256_or_si256(found, _mm256_shuffle_epi8(part, _mm256_adds_epu8(rest, _mm256_set1_epi8(0x70))));
            rest = _mm256_sub_epi8(rest, _mm256_set1_epi8(16));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), found);
    }
    return i;
}

EDGEKIT_TARGET_AVX2 int interleave_avx2(const uint8_t* const planes[3], uint8_t shift, int n, uint8_t* dst) {
    const __m128i more = _mm_set1_epi8(char(shift));
    const char z = char(0x80);
    const __m128i a0 = _mm_setr_epi8(0, z, z, 1, z, z, 2, z, z, 3, z, z, 4, z, z, 5);
    const __m128i b0 = _mm_setr_epi8(z, 0, z, z, 1, z, z, 2, z, z, 3, z, z, 4, z, z);
    const __m128i c0 = _mm_setr_epi8(z, z, 0, z, z, 1, z, z, 2, z, z, 3, z, z, 4, z);
    const __m128i a1 = _mm_setr_epi8(z, z, 6, z, z, 7, z, z, 8, z, z, 9, z, z, 10, z);
    const __m128i b1 = _mm_setr_epi8(5, z, z, 6, z, z, 7, z, z, 8, z, z, 9, z, z, 10);
    const __m128i c1 = _mm_setr_epi8(z, 5, z, z, 6, z, z, 7, z, z, 8, z, z, 9, z, z);
    const __m128i a2 = _mm_setr_epi8(z, 11, z, z, 12, z, z, 13, z, z, 14, z, z, 15, z, z);
    const __m128i b2 = _mm_setr_epi8(z, z, 11, z, z, 12, z, z, 13, z, z, 14, z, z, 15, z);
    const __m128i c2 = _mm_setr_epi8(10, z, z, 11, z, z, 12, z, z, 13, z, z, 14, z, z, 15);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m128i x = _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[0] + i)), more);
        const __m128i y = _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[1] + i)), more);
        const __m128i w = _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[2] + i)), more);
        __m128i* out = reinterpret_cast<__m128i*>(dst + 3 * i);
        _mm_storeu_si128(out, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(x, a0), _mm_shuffle_epi8(y, b0)), _mm_shuffle_epi8(w, c0)));
        _mm_storeu_si128(out + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(x, a1), _mm_shuffle_epi8(y, b1)), _mm_shuffle_epi8(w, c1)));
        _mm_storeu_si128(out + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(x, a2), _mm_shuffle_epi8(y, b2)), _mm_shuffle_epi8(w, c2)));
    }
    return i;
}
#endif

#if EDGEKIT_HAS_NEON
EDGEKIT_INLINE float32x4_t normalise4(const Finish& f, uint16x4_t levels, int i) {
    const float32x4_t v = vcvtq_f32_u32(vmovl_u16(levels));
    if (f.arithmetic == Arithmetic::plain) return v;
    const float32x4_t x = vsubq_f32(v, vld1q_f32(f.mean + i)), std = vld1q_f32(f.std + i);
    if (f.arithmetic == Arithmetic::divided) return vdivq_f32(x, std);
    const float32x4_t inverse = vld1q_f32(f.inverse + i), q = vmulq_f32(x, inverse);
    return vfmaq_f32(q, vfmsq_f32(x, q, std), inverse);
}

int finish_neon(const Finish& f, const uint8_t* levels, int n, void* dst) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const uint16x8_t v = vmovl_u8(vld1_u8(levels + i));
        const float32x4_t a = normalise4(f, vget_low_u16(v), i), b = normalise4(f, vget_high_u16(v), i + 4);
        if (f.type == Out::f32) {
            vst1q_f32(static_cast<float*>(dst) + i, a);
            vst1q_f32(static_cast<float*>(dst) + i + 4, b);
        } else {
            const float16x8_t h = vcombine_f16(vcvt_f16_f32(a), vcvt_f16_f32(b));
            vst1q_u16(static_cast<uint16_t*>(dst) + i, vreinterpretq_u16_f16(h));
        }
    }
    return i;
}

// 256 entries by four lookups of 64: a level outside of one's 64 leaves what was found before.
int look_up_neon(const uint8_t* table, const uint8_t* levels, int n, uint8_t* dst) {
    uint8x16x4_t part[4];
    for (int k = 0; k < 16; k++) part[k / 4].val[k % 4] = vld1q_u8(table + 16 * k);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const uint8x16_t v = vld1q_u8(levels + i);
        uint8x16_t found = vqtbl4q_u8(part[0], v);
        found = vqtbx4q_u8(found, part[1], vsubq_u8(v, vdupq_n_u8(64)));
        found = vqtbx4q_u8(found, part[2], vsubq_u8(v, vdupq_n_u8(128)));
        found = vqtbx4q_u8(found, part[3], vsubq_u8(v, vdupq_n_u8(192)));
        vst1q_u8(dst + i, found);
    }
    return i;
}

int interleave_neon(const uint8_t* const planes[3], uint8_t shift, int n, uint8_t* dst) {
    const uint8x16_t more = vdupq_n_u8(shift);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const uint8x16x3_t v = {{vaddq_u8(vld1q_u8(planes[0] + i), more), vaddq_u8(vld1q_u8(planes[1] + i), more),
                                 vaddq_u8(vld1q_u8(planes[2] + i), more)}};
        vst3q_u8(dst + 3 * i, v);
    }
    return i;
}
#endif

// One row of levels to values, `n` of them: those of one channel, or of all in turn if `interleaved`.
// Bytes may be finished where they lie.
inline void finish_row(Isa isa, const Finish& f, const uint8_t* levels, int n, int channel, bool interleaved, void* dst) {
    int i = 0;
    if (f.type == Out::u8) {
        uint8_t* out = static_cast<uint8_t*>(dst);
        if (f.bytes == Bytes::shifted) {
            if (f.shift != 0) shift_bytes(levels, n, f.shift, out);
            else if (out != levels) std::memcpy(out, levels, n);
            return;
        }
#if EDGEKIT_HAS_AVX2
        if (isa == Isa::avx2 && !interleaved) i = look_up_avx2(f.table + 256 * channel, levels, n, out);
#elif EDGEKIT_HAS_NEON
        if (isa == Isa::neon && !interleaved) i = look_up_neon(f.table + 256 * channel, levels, n, out);
#endif
        return look_up_row<uint8_t>(f, levels, i, n, channel, interleaved, dst);
    }
#if EDGEKIT_HAS_AVX2
    if (isa == Isa::avx2) i = finish_avx2(f, levels, n, dst);
#elif EDGEKIT_HAS_NEON
    if (isa == Isa::neon) i = finish_neon(f, levels, n, dst);
#endif
    if (f.type == Out::f32) look_up_row<float>(f, levels, i, n, channel, interleaved, dst);
    else look_up_row<uint16_t>(f, levels, i, n, channel, interleaved, dst);
}

// Planes of levels to pixels, each byte raised by `shift`.
inline void interleave(Isa isa, const uint8_t* const planes[3], uint8_t shift, int n, uint8_t* dst) {
    int i = 0;
#if EDGEKIT_HAS_AVX2
    if (isa == Isa::avx2) i = interleave_avx2(planes, shift, n, dst);
#elif EDGEKIT_HAS_NEON
    if (isa == Isa::neon) i = interleave_neon(planes, shift, n, dst);
#endif
    interleave_portable(planes, shift, i, n, dst);
}

}  // namespace
}  // namespace edgekit
