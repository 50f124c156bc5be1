// The functions of yuv.h for AVX2 and NEON, and the choice between them. Rows have room for whole vectors.
#pragma once

#include "yuv.h"

namespace edgekit {
namespace {

#if EDGEKIT_HAS_AVX2
#define TARGET EDGEKIT_TARGET_AVX2
#define INLINE EDGEKIT_TARGET_AVX2 EDGEKIT_INLINE

INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
INLINE __m256i low_bytes(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
INLINE __m256i high_bytes(__m256i v) { return _mm256_srli_epi16(v, 8); }

// 16-bit values of two vectors to bytes, in order.
INLINE __m256i pack_bytes(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8); }

template <int luma>
TARGET int unpack_packed_avx2(const uint8_t* row, int pairs, uint8_t* y, uint8_t* u, uint8_t* v) {
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
        const __m256i a = load32(row + 4 * i), b = load32(row + 4 * i + 32);
        const __m256i low = pack_bytes(low_bytes(a), low_bytes(b)), high = pack_bytes(high_bytes(a), high_bytes(b));
        const __m256i chroma = luma ? low : high;
        const __m256i uv = pack_bytes(low_bytes(chroma), high_bytes(chroma));
        store32(y + 2 * i, luma ? high : low);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(u + i), _mm256_castsi256_si128(uv));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(v + i), _mm256_extracti128_si256(uv, 1));
    }
    return i;
}

TARGET int unpack_pairs_avx2(const uint8_t* row, int pairs, uint8_t* u, uint8_t* v) {
    int i = 0;
    for (; i + 32 <= pairs; i += 32) {
        const __m256i a = load32(row + 2 * i), b = load32(row + 2 * i + 32);
        store32(u + i, pack_bytes(low_bytes(a), low_bytes(b)));
        store32(v + i, pack_bytes(high_bytes(a), high_bytes(b)));
    }
    return i;
}

template <int chunks>
TARGET void resample_avx2(const Columns& c, const uint8_t* row, int16_t* dst) {
    const uint8_t* mask = c.mask.data();
    for (int x = 0; x < c.n; x += 16, mask += 32 * chunks) {
        const uint8_t *a = row + c.base[x / 8], *b = row + c.base[x / 8 + 1];
        __m256i pair = _mm256_setzero_si256();
        for (int k = 0; k < chunks; k++) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 16 * k));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 16 * k));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            pair = _mm256_or_si256(pair, _mm256_shuffle_epi8(both, load32(mask + 32 * k)));
        }
        const __m256i first = _mm256_slli_epi16(low_bytes(pair), 7), second = _mm256_slli_epi16(high_bytes(pair), 7);
        const __m256i part = _mm256_mulhrs_epi16(_mm256_sub_epi16(second, first), load32(c.weight.data() + x));
        store32(dst + x, _mm256_add_epi16(first, part));
    }
}

INLINE __m256i times(__m256i a, int16_t b) { return _mm256_mulhrs_epi16(a, _mm256_set1_epi16(b)); }

struct Bgr {
    __m256i blue, green, red;
};

// 16 pixels; y minus black, u and v minus their middle and doubled. Levels not yet clipped.
INLINE Bgr bgr16(__m256i y, __m256i u, __m256i v, const Color& c) {
    y = _mm256_add_epi16(times(y, c.luma), _mm256_set1_epi16(32));
    const __m256i green = _mm256_add_epi16(_mm256_add_epi16(y, times(u, c.u_green)), times(v, c.v_green));
    return {_mm256_srai_epi16(_mm256_adds_epi16(y, times(u, c.u_blue)), 6), _mm256_srai_epi16(green, 6),
            _mm256_srai_epi16(_mm256_adds_epi16(y, times(v, c.v_red)), 6)};
}

INLINE __m256i blend_rows(const int16_t* const rows[2], __m256i weight, int x) {
    const __m256i a = load32(rows[0] + x);
    return _mm256_add_epi16(a, _mm256_mulhrs_epi16(_mm256_sub_epi16(load32(rows[1] + x), a), weight));
}

INLINE Bgr convert16(const Rows& r, const Color& c, int x) {
    const __m256i w = _mm256_set1_epi16(r.weight), middle = _mm256_set1_epi16(1 << 14);
    const __m256i y = _mm256_sub_epi16(blend_rows(r.y, w, x), _mm256_set1_epi16(c.black));
    const __m256i u = _mm256_sub_epi16(blend_rows(r.u, w, x), middle), v = _mm256_sub_epi16(blend_rows(r.v, w, x), middle);
    return bgr16(y, _mm256_slli_epi16(u, 1), _mm256_slli_epi16(v, 1), c);
}

TARGET void convert_avx2(const Rows& r, const Color& c, int n, const Planes& to) {
    for (int x = 0; x < n; x += 32) {
        const Bgr a = convert16(r, c, x), b = convert16(r, c, x + 16);
        store32(to.blue + x, pack_bytes(a.blue, b.blue));
        store32(to.green + x, pack_bytes(a.green, b.green));
        store32(to.red + x, pack_bytes(a.red, b.red));
    }
}

// 16 output pixels of a packed picture, in the order 0-3 8-11 4-7 12-15 that packing leaves.
template <int luma>
INLINE Bgr halve_packed16(const uint8_t* a, const uint8_t* b, const Color& c) {
    const __m256i a0 = load32(a), a1 = load32(a + 32), b0 = load32(b), b1 = load32(b + 32);
    const __m256i low0 = _mm256_add_epi16(low_bytes(a0), low_bytes(b0)), low1 = _mm256_add_epi16(low_bytes(a1), low_bytes(b1));
    const __m256i high0 = _mm256_add_epi16(high_bytes(a0), high_bytes(b0)), high1 = _mm256_add_epi16(high_bytes(a1), high_bytes(b1));
    const __m256i y0 = luma ? high0 : low0, y1 = luma ? high1 : low1;
    const __m256i c0 = luma ? low0 : high0, c1 = luma ? low1 : high1;
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi32(0xffff);
    const __m256i y = _mm256_packs_epi32(_mm256_madd_epi16(y0, ones), _mm256_madd_epi16(y1, ones));
    const __m256i u = _mm256_packs_epi32(_mm256_and_si256(c0, mask), _mm256_and_si256(c1, mask));
    const __m256i v = _mm256_packs_epi32(_mm256_srli_epi32(c0, 16), _mm256_srli_epi32(c1, 16));
    const __m256i middle = _mm256_set1_epi16(-32768);
    return bgr16(_mm256_sub_epi16(_mm256_slli_epi16(y, 5), _mm256_set1_epi16(c.black)),
                 _mm256_add_epi16(_mm256_slli_epi16(u, 7), middle), _mm256_add_epi16(_mm256_slli_epi16(v, 7), middle), c);
}

// The bytes of two such in order.
INLINE __m256i pack_halved(__m256i a, __m256i b) {
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

template <int luma>
TARGET int halve_packed_avx2(const uint8_t* const row[2], const Color& c, int n, const Planes& to) {
    int x = 0;
    for (; x + 32 <= n; x += 32) {
        const Bgr a = halve_packed16<luma>(row[0] + 4 * x, row[1] + 4 * x, c);
        const Bgr b = halve_packed16<luma>(row[0] + 4 * x + 64, row[1] + 4 * x + 64, c);
        store32(to.blue + x, pack_halved(a.blue, b.blue));
        store32(to.green + x, pack_halved(a.green, b.green));
        store32(to.red + x, pack_halved(a.red, b.red));
    }
    return x;
}

// u, v: 16-bit values of 16 pixels.
INLINE Bgr halve_planes16(const uint8_t* a, const uint8_t* b, __m256i u, __m256i v, const Color& c) {
    const __m256i ones = _mm256_set1_epi8(1), middle = _mm256_set1_epi16(-32768);
    const __m256i y = _mm256_add_epi16(_mm256_maddubs_epi16(load32(a), ones), _mm256_maddubs_epi16(load32(b), ones));
    return bgr16(_mm256_sub_epi16(_mm256_slli_epi16(y, 5), _mm256_set1_epi16(c.black)),
                 _mm256_add_epi16(_mm256_slli_epi16(u, 8), middle), _mm256_add_epi16(_mm256_slli_epi16(v, 8), middle), c);
}

INLINE __m256i widen16(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

TARGET int halve_planes_avx2(const uint8_t* const row[2], const uint8_t* u, const uint8_t* v, int step, const Color& c,
                             int n, const Planes& to) {
    int x = 0;
    for (; x + 32 <= n; x += 32) {
        Bgr half[2];
        for (int k = 0; k < 2; k++) {
            const int at = x + 16 * k;
            __m256i us, vs;
            if (step == 2) {  // the lower of the two addresses holds both
                const __m256i both = load32(std::min(u, v) + 2 * at);
                us = u < v ? low_bytes(both) : high_bytes(both), vs = u < v ? high_bytes(both) : low_bytes(both);
            } else {
                us = widen16(u + at), vs = widen16(v + at);
            }
            half[k] = halve_planes16(row[0] + 2 * at, row[1] + 2 * at, us, vs, c);
        }
        store32(to.blue + x, pack_bytes(half[0].blue, half[1].blue));
        store32(to.green + x, pack_bytes(half[0].green, half[1].green));
        store32(to.red + x, pack_bytes(half[0].red, half[1].red));
    }
    return x;
}
#undef INLINE
#undef TARGET
#endif

#if EDGEKIT_HAS_NEON
template <int luma>
int unpack_packed_neon(const uint8_t* row, int pairs, uint8_t* y, uint8_t* u, uint8_t* v) {
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
        const uint8x16x4_t p = vld4q_u8(row + 4 * i);
        const uint8x16x2_t both = {{p.val[luma], p.val[2 + luma]}};
        vst2q_u8(y + 2 * i, both);
        vst1q_u8(u + i, p.val[1 - luma]);
        vst1q_u8(v + i, p.val[3 - luma]);
    }
    return i;
}

int unpack_pairs_neon(const uint8_t* row, int pairs, uint8_t* u, uint8_t* v) {
    int i = 0;
    for (; i + 16 <= pairs; i += 16) {
        const uint8x16x2_t p = vld2q_u8(row + 2 * i);
        vst1q_u8(u + i, p.val[0]);
        vst1q_u8(v + i, p.val[1]);
    }
    return i;
}

template <int chunks>
EDGEKIT_INLINE uint8x16_t pick(const uint8_t* p, uint8x16_t mask) {
    uint8x16_t v[4];
    for (int k = 0; k < chunks; k++) v[k] = vld1q_u8(p + 16 * k);
    if (chunks == 1) return vqtbl1q_u8(v[0], mask);
    if (chunks == 2) return vqtbl2q_u8(uint8x16x2_t{{v[0], v[1]}}, mask);
    if (chunks == 3) return vqtbl3q_u8(uint8x16x3_t{{v[0], v[1], v[2]}}, mask);
    return vqtbl4q_u8(uint8x16x4_t{{v[0], v[1], v[2], v[3]}}, mask);
}

template <int chunks>
void resample_neon(const Columns& c, const uint8_t* row, int16_t* dst) {
    for (int x = 0; x < c.n; x += 8) {
        const uint16x8_t pair = vreinterpretq_u16_u8(pick<chunks>(row + c.base[x / 8], vld1q_u8(c.mask.data() + 2 * x)));
        const int16x8_t first = vreinterpretq_s16_u16(vshlq_n_u16(vandq_u16(pair, vdupq_n_u16(255)), 7));
        const int16x8_t second = vreinterpretq_s16_u16(vshlq_n_u16(vshrq_n_u16(pair, 8), 7));
        vst1q_s16(dst + x, vaddq_s16(first, vqrdmulhq_s16(vsubq_s16(second, first), vld1q_s16(c.weight.data() + x))));
    }
}

// 8 pixels; y minus black, u and v minus their middle and doubled.
EDGEKIT_INLINE void store8(int16x8_t y, int16x8_t u, int16x8_t v, const Color& c, const Planes& to, int x) {
    y = vaddq_s16(vqrdmulhq_n_s16(y, c.luma), vdupq_n_s16(32));
    const int16x8_t green = vaddq_s16(vaddq_s16(y, vqrdmulhq_n_s16(u, c.u_green)), vqrdmulhq_n_s16(v, c.v_green));
    vst1_u8(to.blue + x, vqshrun_n_s16(vqaddq_s16(y, vqrdmulhq_n_s16(u, c.u_blue)), 6));
    vst1_u8(to.green + x, vqshrun_n_s16(green, 6));
    vst1_u8(to.red + x, vqshrun_n_s16(vqaddq_s16(y, vqrdmulhq_n_s16(v, c.v_red)), 6));
}

EDGEKIT_INLINE int16x8_t blend_rows(const int16_t* const rows[2], int16_t weight, int x) {
    const int16x8_t a = vld1q_s16(rows[0] + x);
    return vaddq_s16(a, vqrdmulhq_n_s16(vsubq_s16(vld1q_s16(rows[1] + x), a), weight));
}

void convert_neon(const Rows& r, const Color& c, int n, const Planes& to) {
    const int16x8_t middle = vdupq_n_s16(1 << 14), black = vdupq_n_s16(c.black);
    for (int x = 0; x < n; x += 8) {
        const int16x8_t u = vsubq_s16(blend_rows(r.u, r.weight, x), middle), v = vsubq_s16(blend_rows(r.v, r.weight, x), middle);
        store8(vsubq_s16(blend_rows(r.y, r.weight, x), black), vshlq_n_s16(u, 1), vshlq_n_s16(v, 1), c, to, x);
    }
}

// 8 output pixels of sums: four luma bytes, and of chroma such that `shift` makes its middle 2^15.
template <int shift>
EDGEKIT_INLINE void halve8(uint16x8_t y, uint16x8_t u, uint16x8_t v, const Color& c, const Planes& to, int x) {
    const int16x8_t middle = vdupq_n_s16(-32768);
    store8(vsubq_s16(vreinterpretq_s16_u16(vshlq_n_u16(y, 5)), vdupq_n_s16(c.black)),
           vaddq_s16(vreinterpretq_s16_u16(vshlq_n_u16(u, shift)), middle),
           vaddq_s16(vreinterpretq_s16_u16(vshlq_n_u16(v, shift)), middle), c, to, x);
}

template <int luma>
int halve_packed_neon(const uint8_t* const row[2], const Color& c, int n, const Planes& to) {
    int x = 0;
    for (; x + 8 <= n; x += 8) {
        const uint8x8x4_t a = vld4_u8(row[0] + 4 * x), b = vld4_u8(row[1] + 4 * x);
        const uint16x8_t y = vaddq_u16(vaddl_u8(a.val[luma], a.val[2 + luma]), vaddl_u8(b.val[luma], b.val[2 + luma]));
        halve8<7>(y, vaddl_u8(a.val[1 - luma], b.val[1 - luma]), vaddl_u8(a.val[3 - luma], b.val[3 - luma]), c, to, x);
    }
    return x;
}

int halve_planes_neon(const uint8_t* const row[2], const uint8_t* u, const uint8_t* v, int step, const Color& c, int n,
                      const Planes& to) {
    int x = 0;
    for (; x + 8 <= n; x += 8) {
        const uint16x8_t y = vpadalq_u8(vpaddlq_u8(vld1q_u8(row[0] + 2 * x)), vld1q_u8(row[1] + 2 * x));
        uint8x8_t us, vs;
        if (step == 2) {  // the lower of the two addresses holds both
            const uint8x8x2_t both = vld2_u8(std::min(u, v) + 2 * x);
            us = both.val[u < v ? 0 : 1], vs = both.val[u < v ? 1 : 0];
        } else {
            us = vld1_u8(u + x), vs = vld1_u8(v + x);
        }
        halve8<8>(y, vmovl_u8(us), vmovl_u8(vs), c, to, x);
    }
    return x;
}
#endif

#if EDGEKIT_HAS_AVX2
#define EDGEKIT_TRY(call) if (isa == Isa::avx2) call
#define EDGEKIT_NAME(name) name##_avx2
#elif EDGEKIT_HAS_NEON
#define EDGEKIT_TRY(call) if (isa == Isa::neon) call
#define EDGEKIT_NAME(name) name##_neon
#endif

inline void unpack_packed(Isa isa, const uint8_t* row, int luma, int pairs, uint8_t* y, uint8_t* u, uint8_t* v) {
    int i = 0;
#ifdef EDGEKIT_TRY
    EDGEKIT_TRY(i = luma ? EDGEKIT_NAME(unpack_packed)<1>(row, pairs, y, u, v)
                         : EDGEKIT_NAME(unpack_packed)<0>(row, pairs, y, u, v));
#endif
    unpack_packed(row, luma, i, pairs, y, u, v);
}

inline void unpack_pairs(Isa isa, const uint8_t* row, int pairs, uint8_t* u, uint8_t* v) {
    int i = 0;
#ifdef EDGEKIT_TRY
    EDGEKIT_TRY(i = EDGEKIT_NAME(unpack_pairs)(row, pairs, u, v));
#endif
    unpack_pairs(row, i, pairs, u, v);
}

inline void resample(Isa isa, const Columns& c, const uint8_t* row, int16_t* dst) {
#ifdef EDGEKIT_TRY
    if (isa != Isa::portable) {
        if (c.chunks == 1) return EDGEKIT_NAME(resample)<1>(c, row, dst);
        if (c.chunks == 2) return EDGEKIT_NAME(resample)<2>(c, row, dst);
        if (c.chunks == 3) return EDGEKIT_NAME(resample)<3>(c, row, dst);
        if (c.chunks == 4) return EDGEKIT_NAME(resample)<4>(c, row, dst);
    }
#endif
    resample(c, row, dst);
}

inline void convert(Isa isa, const Rows& r, const Color& c, int n, const Planes& to) {
#ifdef EDGEKIT_TRY
    EDGEKIT_TRY(return EDGEKIT_NAME(convert)(r, c, n, to));
#endif
    convert(r, c, n, to);
}

inline void halve_packed(Isa isa, const uint8_t* const row[2], int luma, const Color& c, int n, const Planes& to) {
    int x = 0;
#ifdef EDGEKIT_TRY
    EDGEKIT_TRY(x = luma ? EDGEKIT_NAME(halve_packed)<1>(row, c, n, to) : EDGEKIT_NAME(halve_packed)<0>(row, c, n, to));
#endif
    halve_packed(row, luma, c, x, n, to);
}

inline void halve_planes(Isa isa, const uint8_t* const row[2], const uint8_t* u, const uint8_t* v, int step,
                         const Color& c, int n, const Planes& to) {
    int x = 0;
#ifdef EDGEKIT_TRY
    EDGEKIT_TRY(x = EDGEKIT_NAME(halve_planes)(row, u, v, step, c, n, to));
#endif
    halve_planes(row, u, v, step, c, x, n, to);
}

}  // namespace
}  // namespace edgekit
