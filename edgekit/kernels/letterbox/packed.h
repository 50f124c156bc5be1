// Packed RGB and grey, bilinear: two taps horizontally into 16-bit rows, two rows blended into levels.
#pragma once

#include "finish.h"

#include <algorithm>

namespace edgekit {
namespace {

// What a horizontal pass needs to know. Rows of `dst` are [3][plane] if planar, else [n][3].
struct Horizontal {
    int n;                    // output pixels
    int safe;                 // leading ones whose 8-byte load stays inside the source row
    int channels;             // bytes per source pixel
    int last;                 // byte offset of the last source pixel
    const int32_t* offset;    // [n] byte offset of the first tap
    const uint32_t* weight;   // [n] both weights, first in the low half
    const int* order;         // [3] source channel of each output channel
    const uint8_t* shuffle;   // [16] bytes of one pixel pair as 16-bit (first, second) x 3 channels
    bool planar;
    int plane;
};

inline void horizontal_scalar(const Horizontal& s, const uint8_t* row, int from, uint16_t* dst) {
    const int step = s.planar ? 1 : 3, plane = s.planar ? s.plane : 1;
    for (int x = from; x < s.n; x++) {
        const uint8_t* first = row + s.offset[x];
        const uint8_t* second = row + std::min(s.offset[x] + s.channels, s.last);
        const int a = int(s.weight[x] & 0xffff), b = int(s.weight[x] >> 16);
        for (int c = 0; c < 3; c++) {
            const int k = s.order[c];
            dst[x * step + c * plane] = uint16_t((a * first[k] + b * second[k] + 8) >> 4);
        }
    }
}

void horizontal_portable(const Horizontal& s, const uint8_t* row, const uint8_t*, uint16_t* dst) {
    horizontal_scalar(s, row, 0, dst);
}

// A frame comes from memory, and the rows skipped between two output rows lead hardware prefetchers
// astray: each block asks for its like in the rows that are needed next.
EDGEKIT_INLINE void prefetch(const uint8_t* ahead, int32_t offset) {
#if defined(__GNUC__)
    __builtin_prefetch(ahead + offset);
#endif
}

EDGEKIT_INLINE int blend(int top, int bottom, const uint16_t* h0, const uint16_t* h1, int i) {
    return (top * h0[i] + bottom * h1[i] + (1 << 17)) >> 18;
}

// Vertical pass of n values.
struct Vertical {
    int n;
    int top, bottom;  // weights
    const uint16_t *h0, *h1;
};

inline void vertical_portable(const Vertical& v, int from, uint8_t* dst) {
    const int n = v.n, top = v.top, bottom = v.bottom;
    const uint16_t *h0 = v.h0, *h1 = v.h1;
    for (int i = from; i < n; i++) dst[i] = uint8_t(blend(top, bottom, h0, h1, i));
}

#if EDGEKIT_HAS_AVX2
#define TARGET EDGEKIT_TARGET_AVX2
TARGET inline __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// Pixels x (low lane) and x + 4 (high lane): 32-bit sums, rounded to 7 fractional bits.
template <int lane>
TARGET EDGEKIT_INLINE __m256i two_pixels(const uint8_t* row, const int32_t* offset, __m256i shuffle, __m256i weight) {
    __m256i pair = _mm256_inserti128_si256(_mm256_castsi128_si256(load8(row + offset[lane])),
                                           load8(row + offset[lane + 4]), 1);
    pair = _mm256_shuffle_epi8(pair, shuffle);
    const __m256i sum = _mm256_madd_epi16(pair, _mm256_shuffle_epi32(weight, lane * 0x55));
    return _mm256_srli_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(8)), 4);
}

TARGET void horizontal_avx2(const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) {
    const __m256i shuffle = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.shuffle)));
    int x = 0;
    for (; x + 8 <= s.safe; x += 8) {
        const int32_t* offset = s.offset + x;
        const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.weight + x));
        prefetch(ahead, offset[0]), prefetch(ahead, offset[4]);
        // each lane: channels 0 1 2 - of pixel 0, then of pixel 1
        const __m256i p01 = _mm256_packus_epi32(two_pixels<0>(row, offset, shuffle, weight),
                                                two_pixels<1>(row, offset, shuffle, weight));
        const __m256i p23 = _mm256_packus_epi32(two_pixels<2>(row, offset, shuffle, weight),
                                                two_pixels<3>(row, offset, shuffle, weight));
        if (s.planar) {
            const __m256i even = _mm256_unpacklo_epi16(p01, p23), odd = _mm256_unpackhi_epi16(p01, p23);
            __m256i c01 = _mm256_unpacklo_epi16(even, odd), c2 = _mm256_unpackhi_epi16(even, odd);
            c01 = _mm256_permute4x64_epi64(c01, 0xd8);
            c2 = _mm256_permute4x64_epi64(c2, 0xd8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + x), _mm256_castsi256_si128(c01));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + s.plane + x), _mm256_extracti128_si256(c01, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * s.plane + x), _mm256_castsi256_si128(c2));
        } else {  // in order: the fourth value of each store is overwritten by the next pixel
            const __m128i quads[4] = {_mm256_castsi256_si128(p01), _mm256_castsi256_si128(p23),
                                      _mm256_extracti128_si256(p01, 1), _mm256_extracti128_si256(p23, 1)};
            for (int k = 0; k < 4; k++) {
                uint16_t* p = dst + 3 * (x + 2 * k);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(p), quads[k]);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 3), _mm_unpackhi_epi64(quads[k], quads[k]));
            }
        }
    }
    horizontal_scalar(s, row, x, dst);
}

// 16 values as 16-bit integers, in the order that packing two of these by bytes undoes.
TARGET EDGEKIT_INLINE __m256i blend16(const Vertical& v, __m256i weight, int i) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v.h0 + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v.h1 + i));
    const __m256i half = _mm256_set1_epi32(1 << 17);
    const __m256i x = _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weight);
    const __m256i y = _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weight);
    return _mm256_packs_epi32(_mm256_srli_epi32(_mm256_add_epi32(x, half), 18),
                              _mm256_srli_epi32(_mm256_add_epi32(y, half), 18));
}

TARGET void vertical_avx2(const Vertical& v, uint8_t* dst) {
    const __m256i weight = _mm256_set1_epi32(v.top | (v.bottom << 16));
    int i = 0;
    for (; i + 32 <= v.n; i += 32) {
        const __m256i bytes = _mm256_packus_epi16(blend16(v, weight, i), blend16(v, weight, i + 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), _mm256_permute4x64_epi64(bytes, 0xd8));
    }
    vertical_portable(v, i, dst);
}
#undef TARGET
#endif

#if EDGEKIT_HAS_NEON
EDGEKIT_INLINE uint16x4_t one_pixel(const uint8_t* row, int32_t offset, uint8x8_t shuffle, uint32_t weight) {
    // channels 0 1 2 - of the first tap, then of the second
    const uint16x8_t pair = vmovl_u8(vtbl1_u8(vld1_u8(row + offset), shuffle));
    const uint32x4_t sum = vmlal_n_u16(vmull_n_u16(vget_low_u16(pair), uint16_t(weight & 0xffff)),
                                       vget_high_u16(pair), uint16_t(weight >> 16));
    return vrshrn_n_u32(sum, 4);
}

void horizontal_neon(const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) {
    uint8_t order[8];  // s.shuffle names (first, second) x 3 as 16-bit values
    for (int c = 0; c < 4; c++) {
        order[c] = s.shuffle[4 * c];
        order[c + 4] = s.shuffle[4 * c + 2];
    }
    const uint8x8_t shuffle = vld1_u8(order);
    int x = 0;
    for (; x + 4 <= s.safe; x += 4) {
        const int32_t* offset = s.offset + x;
        const uint32_t* weight = s.weight + x;
        prefetch(ahead, offset[0]);
        const uint16x4_t p0 = one_pixel(row, offset[0], shuffle, weight[0]);
        const uint16x4_t p1 = one_pixel(row, offset[1], shuffle, weight[1]);
        const uint16x4_t p2 = one_pixel(row, offset[2], shuffle, weight[2]);
        const uint16x4_t p3 = one_pixel(row, offset[3], shuffle, weight[3]);
        if (s.planar) {
            const uint16x8_t p01 = vcombine_u16(p0, p1), p23 = vcombine_u16(p2, p3);
            const uint16x8_t even = vzip1q_u16(p01, p23), odd = vzip2q_u16(p01, p23);
            const uint16x8_t c01 = vzip1q_u16(even, odd), c2 = vzip2q_u16(even, odd);
            vst1_u16(dst + x, vget_low_u16(c01));
            vst1_u16(dst + s.plane + x, vget_high_u16(c01));
            vst1_u16(dst + 2 * s.plane + x, vget_low_u16(c2));
        } else {  // in order: the fourth value of each store is overwritten by the next pixel
            vst1_u16(dst + 3 * x, p0);
            vst1_u16(dst + 3 * x + 3, p1);
            vst1_u16(dst + 3 * x + 6, p2);
            vst1_u16(dst + 3 * x + 9, p3);
        }
    }
    horizontal_scalar(s, row, x, dst);
}

EDGEKIT_INLINE uint16x4_t blend4(uint16x4_t a, uint16x4_t b, uint16_t top, uint16_t bottom) {
    return vmovn_u32(vrshrq_n_u32(vmlal_n_u16(vmull_n_u16(a, top), b, bottom), 18));
}

void vertical_neon(const Vertical& v, uint8_t* dst) {
    const uint16_t top = uint16_t(v.top), bottom = uint16_t(v.bottom);
    int i = 0;
    for (; i + 8 <= v.n; i += 8) {
        const uint16x8_t a = vld1q_u16(v.h0 + i), b = vld1q_u16(v.h1 + i);
        vst1_u8(dst + i, vmovn_u16(vcombine_u16(blend4(vget_low_u16(a), vget_low_u16(b), top, bottom),
                                                blend4(vget_high_u16(a), vget_high_u16(b), top, bottom))));
    }
    vertical_portable(v, i, dst);
}
#endif

// Half the size both ways: weights are all 1/2, and the arithmetic above is (a + b + c + d + 2) >> 2.
struct Halving {
    int channels;
    const int* order;     // [3] source channel of each output channel
    const uint8_t* mask;  // [3][channels][16]: where the bytes of a channel lie in `channels` times 16
};

inline void halve_portable(const Halving& h, const uint8_t* const row[2], int from, int n, uint8_t* const to[3]) {
    for (int c = 0; c < 3; c++)
        for (int x = from; x < n; x++) {
            const uint8_t *a = row[0] + 2 * x * h.channels + h.order[c], *b = row[1] + 2 * x * h.channels + h.order[c];
            to[c][x] = uint8_t((a[0] + a[h.channels] + b[0] + b[h.channels] + 2) >> 2);
        }
}

#if EDGEKIT_HAS_AVX2
// 16 output pixels; each lane has 16 source pixels of a row in `channels` vectors.
template <int channels>
EDGEKIT_TARGET_AVX2 int halve_avx2(const Halving& h, const uint8_t* const row[2], int n, uint8_t* const to[3]) {
    const __m256i ones = _mm256_set1_epi8(1), two = _mm256_set1_epi16(2);
    int x = 0;
    for (; x + 16 <= n; x += 16) {
        __m256i v[2][channels];
        for (int r = 0; r < 2; r++)
            for (int k = 0; k < channels; k++) {
                const uint8_t* p = row[r] + 2 * x * channels + 16 * k;
                const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
                const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * channels));
                v[r][k] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
            }
        for (int c = 0; c < 3; c++) {
            __m256i sum = two;
            for (int r = 0; r < 2; r++) {
                __m256i bytes = _mm256_setzero_si256();
                for (int k = 0; k < channels; k++) {
                    const __m128i* mask = reinterpret_cast<const __m128i*>(h.mask + (c * channels + k) * 16);
                    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(mask));
                    bytes = _mm256_or_si256(bytes, _mm256_shuffle_epi8(v[r][k], both));
                }
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(bytes, ones));
            }
            sum = _mm256_srli_epi16(sum, 2);
            sum = _mm256_permute4x64_epi64(_mm256_packus_epi16(sum, sum), 0xd8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to[c] + x), _mm256_castsi256_si128(sum));
        }
    }
    return x;
}
#endif

#if EDGEKIT_HAS_NEON
EDGEKIT_INLINE void halve8(uint8x16_t a, uint8x16_t b, uint8_t* to) {
    vst1_u8(to, vrshrn_n_u16(vpadalq_u8(vpaddlq_u8(a), b), 2));
}

int halve_neon(const Halving& h, const uint8_t* const row[2], int n, uint8_t* const to[3]) {
    int x = 0;
    for (; x + 8 <= n; x += 8) {
        const uint8_t *p = row[0] + 2 * x * h.channels, *q = row[1] + 2 * x * h.channels;
        if (h.channels == 1) {
            for (int c = 0; c < 3; c++) halve8(vld1q_u8(p), vld1q_u8(q), to[c] + x);
        } else if (h.channels == 3) {
            const uint8x16x3_t a = vld3q_u8(p), b = vld3q_u8(q);
            halve8(a.val[0], b.val[0], to[h.order[0]] + x);  // the order is its own inverse
            halve8(a.val[1], b.val[1], to[h.order[1]] + x);
            halve8(a.val[2], b.val[2], to[h.order[2]] + x);
        } else {
            const uint8x16x4_t a = vld4q_u8(p), b = vld4q_u8(q);
            halve8(a.val[0], b.val[0], to[h.order[0]] + x);
            halve8(a.val[1], b.val[1], to[h.order[1]] + x);
            halve8(a.val[2], b.val[2], to[h.order[2]] + x);
        }
    }
    return x;
}
#endif

inline void halve(Isa isa, const Halving& h, const uint8_t* const row[2], int n, uint8_t* const to[3]) {
    int x = 0;
#if EDGEKIT_HAS_AVX2
    if (isa == Isa::avx2) x = h.channels == 1 ? halve_avx2<1>(h, row, n, to) : h.channels == 3 ? halve_avx2<3>(h, row, n, to)
                                                                             : halve_avx2<4>(h, row, n, to);
#elif EDGEKIT_HAS_NEON
    if (isa == Isa::neon) x = halve_neon(h, row, n, to);
#endif
    halve_portable(h, row, x, n, to);
}

inline void horizontal(Isa isa, const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) {
#if EDGEKIT_HAS_AVX2
    if (isa == Isa::avx2) return horizontal_avx2(s, row, ahead, dst);
#elif EDGEKIT_HAS_NEON
    if (isa == Isa::neon) return horizontal_neon(s, row, ahead, dst);
#endif
    horizontal_portable(s, row, ahead, dst);
}

inline void vertical(Isa isa, const Vertical& v, uint8_t* dst) {
#if EDGEKIT_HAS_AVX2
    if (isa == Isa::avx2) return vertical_avx2(v, dst);
#elif EDGEKIT_HAS_NEON
    if (isa == Isa::neon) return vertical_neon(v, dst);
#endif
    vertical_portable(v, 0, dst);
}

}  // namespace
}  // namespace edgekit
