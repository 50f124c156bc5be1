// Vectors of 256 bits, for avx2.cpp and avxvnni.cpp: all but the sums of products.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "codes.h"

namespace edgekit {
namespace {

struct Vec256 {
    using I = __m256i;
    using F = __m256;
    static constexpr int kLanes = 8, kBytes = 32;
    static constexpr int kWidest = 2;
    static constexpr int kRegisters = 16;
    template <int NB> static constexpr int kPixels = NB == 2 ? 6 : 12;

    // whole vectors
    static EK_INLINE I load(const void* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static EK_INLINE F loadf(const float* p) { return _mm256_loadu_ps(p); }
    static EK_INLINE I first(int count) {  // all bits of the first ones
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static EK_INLINE F loadf(const float* p, int count) {  // the first ones; 0 behind
        return count >= 8 ? loadf(p) : _mm256_maskload_ps(p, first(count));
    }
    static EK_INLINE void store(void* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static EK_INLINE void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
    static EK_INLINE void storef(float* p, F v, int count) {
        if (count >= 8) storef(p, v);
        else if (count > 0) _mm256_maskstore_ps(p, first(count), v);
    }
    static EK_INLINE I set32(int x) { return _mm256_set1_epi32(x); }
    static EK_INLINE I set16(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
    static EK_INLINE I set8(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
    static EK_INLINE F setf(float x) { return _mm256_set1_ps(x); }
    static EK_INLINE I group(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }

    // arithmetic
    static EK_INLINE F real(I a) { return _mm256_cvtepi32_ps(a); }
    static EK_INLINE F bare(I a) { return _mm256_castsi256_ps(a); }
    static EK_INLINE I rne(F a) { return _mm256_cvtps_epi32(a); }
    static EK_INLINE F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
    static EK_INLINE F addf(F a, F b) { return _mm256_add_ps(a, b); }
    static EK_INLINE F subf(F a, F b) { return _mm256_sub_ps(a, b); }
    static EK_INLINE F divf(F a, F b) { return _mm256_div_ps(a, b); }
    static EK_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static EK_INLINE F maxf(F a, F b) { return _mm256_max_ps(a, b); }
    static EK_INLINE F minf(F a, F b) { return _mm256_min_ps(a, b); }
    static EK_INLINE F negf(F a) { return _mm256_xor_ps(a, setf(-0.0f)); }
    static EK_INLINE F pick_negative(F x, F yes, F no) {  // x < 0
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, setf(0.0f), _CMP_LT_OQ));
    }
    static EK_INLINE F pick_positive(F x, F yes, F no) {  // x >= 0
        return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, setf(0.0f), _CMP_GE_OQ));
    }
    static EK_INLINE F raised(F a, F by) {  // a times 2 to the integer in the low bits
        return bare(add32(_mm256_slli_epi32(_mm256_castps_si256(by), 23), _mm256_castps_si256(a)));
    }
    static EK_INLINE I held_rne(F a) {  // held below 2^30; NaN gives 0
        const F held = _mm256_max_ps(_mm256_min_ps(a, setf(1073741696.0f)), setf(-1073741696.0f));
        return _mm256_and_si256(rne(held), _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_ORD_Q)));
    }
    static EK_INLINE I max8(I a, I b) { return _mm256_max_epu8(a, b); }
    static EK_INLINE I add32(I a, I b) { return _mm256_add_epi32(a, b); }
    static EK_INLINE I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
    static EK_INLINE I add16(I a, I b) { return _mm256_adds_epi16(a, b); }
    static EK_INLINE I scale(I sum, const float* m) { return rne(mulf(real(sum), loadf(m))); }

    // packing leaves 128-bit parts interleaved; order() puts them in order, unpacking by parts undoes it
    static EK_INLINE I words(I a, I b) { return _mm256_packs_epi32(a, b); }
    static EK_INLINE I bytes(I a, I b) { return _mm256_packus_epi16(a, b); }
    static EK_INLINE I order(I a) { return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
    static EK_INLINE I low8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
    static EK_INLINE I high8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
    static EK_INLINE I low16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
    static EK_INLINE I high16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }

    static EK_INLINE I twice(const void* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    // 256 bytes as 16 rows. A shuffle gives 0 where an index is negative: each row holds its difference (xor) from the
    // row before, and a code that counts down by 16 collects the differences of all rows up to its own.
    struct Table {
        I row[16];
    };
    static EK_INLINE Table table(const uint8_t* p) {
        Table t;
        for (int half = 0; half < 2; ++half) {
            I before = set32(0);
            for (int i = 0; i < 8; ++i) {
                const I row = twice(p + 128 * half + 16 * i);
                t.row[8 * half + i] = _mm256_xor_si256(row, before);
                before = row;
            }
        }
        return t;
    }
    static EK_INLINE I look(const Table& t, I codes) {
        const I sixteen = set8(16);
        I low = codes, high = _mm256_xor_si256(codes, set8(-128));  // codes of the other half are negative and stay so
        I a = _mm256_shuffle_epi8(t.row[0], low), b = _mm256_shuffle_epi8(t.row[8], high);
#pragma GCC unroll 8
        for (int i = 1; i < 8; ++i) {
            low = _mm256_subs_epi8(low, sixteen);
            high = _mm256_subs_epi8(high, sixteen);
            a = _mm256_xor_si256(a, _mm256_shuffle_epi8(t.row[i], low));
            b = _mm256_xor_si256(b, _mm256_shuffle_epi8(t.row[8 + i], high));
        }
        return _mm256_xor_si256(a, b);
    }

    static constexpr int kWindow = 16;
    template <bool Wide> static EK_INLINE I pick(I v, const uint8_t* window, I picks) {
        return _mm256_or_si256(v, _mm256_shuffle_epi8(twice(window), picks));
    }

    // The same for 64 numbers of two bytes, both for base and slope.
    struct Curve {
        I base[8], slope[8];
    };
    static EK_INLINE Curve curve(const int16_t* p) {
        Curve c;
        I before = set32(0), before2 = before;
        for (int i = 0; i < 8; ++i) {
            const I base = twice(p + 8 * i), slope = twice(p + 64 + 8 * i);
            c.base[i] = _mm256_xor_si256(base, before);
            c.slope[i] = _mm256_xor_si256(slope, before2);
            before = base, before2 = slope;
        }
        return c;
    }
    // 16-bit results of the curve, before they become bytes (finish_of() changed its bases)
    static EK_INLINE I bend(const Curve& c, I r, I shift) {
        const I u = _mm256_max_epi16(_mm256_adds_epi16(r, shift), _mm256_setzero_si256());
        const I i = _mm256_slli_epi16(_mm256_srli_epi16(u, 9), 1);
        const I f = _mm256_slli_epi16(u, 6);
        I at = _mm256_add_epi8(_mm256_or_si256(i, _mm256_slli_epi16(i, 8)), set16(0x0100));  // bytes 2 i, 2 i + 1
        I base = _mm256_shuffle_epi8(c.base[0], at), slope = _mm256_shuffle_epi8(c.slope[0], at);
#pragma GCC unroll 8
        for (int k = 1; k < 8; ++k) {
            at = _mm256_sub_epi8(at, set8(16));
            base = _mm256_xor_si256(base, _mm256_shuffle_epi8(c.base[k], at));
            slope = _mm256_xor_si256(slope, _mm256_shuffle_epi8(c.slope[k], at));
        }
        return _mm256_srai_epi16(_mm256_adds_epi16(base, _mm256_mulhrs_epi16(slope, f)), 6);
    }

    // codes of P pixels in one vector
    static EK_INLINE __m128i half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static EK_INLINE __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
    template <int P> static EK_INLINE I gather(const uint8_t* p, ptrdiff_t step) {
        if (P == 1 || step == 32 / P) return load(p);
        if (P == 2) return _mm256_inserti128_si256(_mm256_castsi128_si256(half(p)), half(p + step), 1);
        const __m128i ab = _mm_unpacklo_epi64(eight(p), eight(p + step));
        const __m128i cd = _mm_unpacklo_epi64(eight(p + 2 * step), eight(p + 3 * step));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(ab), cd, 1);
    }
    template <int P> static EK_INLINE void scatter(uint8_t* p, ptrdiff_t step, I v) {
        if (P == 1 || step == 32 / P) return store(p, v);
        const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        if (P == 2) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p + step), high);
            return;
        }
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + step), _mm_unpackhi_epi64(low, low));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * step), high);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 3 * step), _mm_unpackhi_epi64(high, high));
    }
    static EK_INLINE void store_few(uint8_t* p, __m128i v, int count) {  // less than 16
        if (count & 8) {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v);
            v = _mm_unpackhi_epi64(v, v);
            p += 8;
        }
        uint64_t rest = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
        if (count & 4) {
            std::memcpy(p, &rest, 4);
            rest >>= 32;
            p += 4;
        }
        if (count & 2) {
            std::memcpy(p, &rest, 2);
            rest >>= 16;
            p += 2;
        }
        if (count & 1) *p = static_cast<uint8_t>(rest);
    }
    template <int P> static EK_INLINE void scatter(uint8_t* p, ptrdiff_t step, I v, int count) {
        if (count >= kBytes / P) return scatter<P>(p, step, v);
        const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        if (P == 1) {
            if (count < 16) return store_few(p, low, count);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
            return store_few(p + 16, high, count - 16);
        }
        store_few(p, low, count);
        if (P == 2) return store_few(p + step, high, count);
        store_few(p + step, _mm_unpackhi_epi64(low, low), count);
        store_few(p + 2 * step, high, count);
        store_few(p + 3 * step, _mm_unpackhi_epi64(high, high), count);
    }

    struct Floats {
        const float* values;
        EK_INLINE Floats(const float* of, const uint8_t*) : values(of) {}
        static const void* prepare(const float*, Store&) { return nullptr; }
        EK_INLINE void look(const uint8_t* from, float* to, int count) const {
            for (int k = 0; k < count; ++k) to[k] = values[from[k]];
        }
    };
};

}  // namespace
}  // namespace edgekit
