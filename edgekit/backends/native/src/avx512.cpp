// AVX512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <new>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own header, its _mm512_undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")

#include "codes.h"
#include "dense.h"
#include "depthwise.h"
#include "floats.h"
#include "pixels.h"

namespace edgekit {
namespace {

struct Avx512 {
    using I = __m512i;
    using F = __m512;
    static constexpr int kLanes = 16, kBytes = 64;
    static constexpr int kUnit = 1;    // bytes of an activation as it is multiplied
    static constexpr int kWidest = 4;  // vectors of outputs in a tile
    static constexpr int kRegisters = 32;
    template <int NB> static constexpr int kPixels = NB == 4 ? 7 : NB == 3 ? 8 : NB == 2 ? 12 : 16;

    // whole vectors
    static EK_INLINE I load(const void* p) { return _mm512_loadu_si512(p); }
    static EK_INLINE F loadf(const float* p) { return _mm512_loadu_ps(p); }
    static EK_INLINE F loadf(const float* p, int count) {  // the first ones; 0 behind
        if (count >= 16) return loadf(p);
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0), p);
    }
    static EK_INLINE void store(void* p, I v) { _mm512_storeu_si512(p, v); }
    static EK_INLINE void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
    static EK_INLINE void storef(float* p, F v, int count) {
        if (count >= 16) storef(p, v);
        else if (count > 0) _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
    }
    static EK_INLINE I set32(int x) { return _mm512_set1_epi32(x); }
    static EK_INLINE I set16(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
    static EK_INLINE I set8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static EK_INLINE F setf(float x) { return _mm512_set1_ps(x); }

    // sums of products
    static EK_INLINE I group(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    // asm: gcc 12 moves and spills the sums around the intrinsic
    static EK_INLINE void dot(I& sum, I a, I w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); }

    static EK_INLINE void dot(I& sum, I a, const uint8_t* w) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const __m512i_u*>(w)));
    }

    // the same of weights that lie by channel, four rows each
    static constexpr int kQuad = 64;  // bytes of a vector of them
    using Quad = I;
    static EK_INLINE Quad quad(const uint8_t* p) { return load(p); }
    static EK_INLINE void dot_quad(I& sum, I a, const Quad& w) { dot(sum, a, w); }
    static EK_INLINE void dot_quad(I& sum, I a, const uint8_t* w) { dot(sum, a, w); }
    static void put_quad(uint8_t* vector, int lane, int row, int8_t w) { vector[4 * lane + row] = static_cast<uint8_t>(w); }

    // arithmetic
    static EK_INLINE F real(I a) { return _mm512_cvtepi32_ps(a); }
    static EK_INLINE F bare(I a) { return _mm512_castsi512_ps(a); }
    static EK_INLINE I rne(F a) { return _mm512_cvtps_epi32(a); }
    static EK_INLINE F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
    static EK_INLINE F addf(F a, F b) { return _mm512_add_ps(a, b); }
    static EK_INLINE F subf(F a, F b) { return _mm512_sub_ps(a, b); }
    static EK_INLINE F divf(F a, F b) { return _mm512_div_ps(a, b); }
    static EK_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static EK_INLINE F maxf(F a, F b) { return _mm512_max_ps(a, b); }
    static EK_INLINE F minf(F a, F b) { return _mm512_min_ps(a, b); }
    static EK_INLINE F negf(F a) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), set32(INT32_MIN))); }
    static EK_INLINE F pick_negative(F x, F yes, F no) {  // x < 0
        return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, setf(0.0f), _CMP_LT_OQ), yes);
    }
    static EK_INLINE F pick_positive(F x, F yes, F no) {  // x >= 0
        return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, setf(0.0f), _CMP_GE_OQ), yes);
    }
    static EK_INLINE F raised(F a, F by) {  // a times 2 to the integer in the low bits
        return bare(add32(_mm512_slli_epi32(_mm512_castps_si512(by), 23), _mm512_castps_si512(a)));
    }
    static EK_INLINE I held_rne(F a) {  // held below 2^30; NaN gives 0
        const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
        return _mm512_maskz_cvtps_epi32(number, _mm512_max_ps(_mm512_min_ps(a, setf(1073741760.0f)), setf(-1073741760.0f)));
    }
    static EK_INLINE I max8(I a, I b) { return _mm512_max_epu8(a, b); }
    static EK_INLINE I add32(I a, I b) { return _mm512_add_epi32(a, b); }
    static EK_INLINE I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
    static EK_INLINE I add16(I a, I b) { return _mm512_adds_epi16(a, b); }
    static EK_INLINE I scale(I sum, const float* m) { return rne(mulf(real(sum), loadf(m))); }

    // packing leaves 128-bit parts interleaved; order() puts them in order, unpacking by parts undoes it
    static EK_INLINE I words(I a, I b) { return _mm512_packs_epi32(a, b); }
    static EK_INLINE I bytes(I a, I b) { return _mm512_packus_epi16(a, b); }
    static EK_INLINE I order(I a) {
        return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), a);
    }
    // the lower lanes of a, the upper ones of b
    static EK_INLINE I two_halves(I a, I b) { return _mm512_mask_mov_epi32(a, 0xff00, b); }
    // of two pixels, each a vector of outputs, and half a vector of both: each pixel's codes at the start of its half
    static EK_INLINE I order_halves(I a) {
        return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 14, 10, 13, 9, 5, 1, 15, 11, 6, 2, 12, 8, 4, 0), a);
    }
    static EK_INLINE I low8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
    static EK_INLINE I high8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
    static EK_INLINE I low16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
    static EK_INLINE I high16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }

    struct Table {
        I part[4];
    };
    static EK_INLINE Table table(const uint8_t* p) { return {{load(p), load(p + 64), load(p + 128), load(p + 192)}}; }
    static EK_INLINE I look(const Table& t, I codes) {
        const I low = _mm512_permutex2var_epi8(t.part[0], codes, t.part[1]);
        const I high = _mm512_permutex2var_epi8(t.part[2], codes, t.part[3]);
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
    }

    static constexpr int kWindow = 128;
    template <bool Wide> static EK_INLINE I pick(I v, const uint8_t* window, I picks) {  // Wide: bytes behind the first 64 may be read
        const I found = Wide ? _mm512_permutex2var_epi8(load(window), picks, load(window + 64)) : _mm512_permutexvar_epi8(picks, load(window));
        return _mm512_mask_mov_epi8(found, _mm512_movepi8_mask(picks), v);
    }

    struct Curve {
        I base[2], slope[2];
    };
    static EK_INLINE Curve curve(const int16_t* p) { return {{load(p), load(p + 32)}, {load(p + 64), load(p + 96)}}; }
    // 16-bit results of the curve, before they become bytes (finish_of() changed its bases)
    static EK_INLINE I bend(const Curve& c, I r, I shift) {
        const I u = _mm512_max_epi16(_mm512_adds_epi16(r, shift), _mm512_setzero_si512());
        const I i = _mm512_srli_epi16(u, 9);
        const I f = _mm512_slli_epi16(u, 6);
        const I base = _mm512_permutex2var_epi16(c.base[0], i, c.base[1]);
        const I slope = _mm512_permutex2var_epi16(c.slope[0], i, c.slope[1]);
        return _mm512_srai_epi16(_mm512_adds_epi16(base, _mm512_mulhrs_epi16(slope, f)), 6);
    }

    // codes of P pixels in one vector
    template <int P> static EK_INLINE I gather(const uint8_t* p, ptrdiff_t step) {
        if (P == 1 || step == 64 / P) return load(p);
        if (P == 2) {
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + step));
            return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        }
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + step));
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * step));
        const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 3 * step));
        const __m256i ab = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
        const __m256i cd = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(ab), cd, 1);
    }
    template <int P> static EK_INLINE void scatter(uint8_t* p, ptrdiff_t step, I v) {
        if (P == 1 || step == 64 / P) return store(p, v);
        if (P == 2) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(v));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + step), _mm512_extracti64x4_epi64(v, 1));
            return;
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(v));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + step), _mm512_extracti32x4_epi32(v, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * step), _mm512_extracti32x4_epi32(v, 2));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * step), _mm512_extracti32x4_epi32(v, 3));
    }
    template <int P> static EK_INLINE void scatter(uint8_t* p, ptrdiff_t step, I v, int count) {
        if (count >= 64 / P) return scatter<P>(p, step, v);
        const __mmask64 mask = (1ull << count) - 1;
        if (P == 1) return _mm512_mask_storeu_epi8(p, mask, v);
        if (P == 2) {
            _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(mask), _mm512_castsi512_si256(v));
            _mm256_mask_storeu_epi8(p + step, static_cast<__mmask32>(mask), _mm512_extracti64x4_epi64(v, 1));
            return;
        }
        const __mmask16 few = static_cast<__mmask16>(mask);
        _mm_mask_storeu_epi8(p, few, _mm512_castsi512_si128(v));
        _mm_mask_storeu_epi8(p + step, few, _mm512_extracti32x4_epi32(v, 1));
        _mm_mask_storeu_epi8(p + 2 * step, few, _mm512_extracti32x4_epi32(v, 2));
        _mm_mask_storeu_epi8(p + 3 * step, few, _mm512_extracti32x4_epi32(v, 3));
    }

    // 256 floats, as four tables of their bytes
    struct Floats {
        Table plane[4];
        const float* values;
        EK_INLINE Floats(const float* of, const uint8_t* planes) : values(of) {
            for (int i = 0; i < 4; ++i) plane[i] = table(planes + 256 * i);
        }
        static const void* prepare(const float* values, Store& store) {
            uint8_t* planes = store.bytes(1024);
            for (int i = 0; i < 1024; ++i) planes[i % 4 * 256 + i / 4] = reinterpret_cast<const uint8_t*>(values)[i];
            return planes;
        }
        EK_INLINE void look(const uint8_t* from, float* to, int count) const {
            if (count < 16) {
                for (int k = 0; k < count; ++k) to[k] = values[from[k]];
                return;
            }
            const I spread = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
            for (int k = 0; k < count; k += 64) {
                const I v = _mm512_permutexvar_epi32(spread, load(from + k));
                const I a = Avx512::look(plane[0], v), b = Avx512::look(plane[1], v);
                const I c = Avx512::look(plane[2], v), d = Avx512::look(plane[3], v);
                const I ab = low8(a, b), ab2 = high8(a, b), cd = low8(c, d), cd2 = high8(c, d);
                const I part[4] = {low16(ab, cd), high16(ab, cd), low16(ab2, cd2), high16(ab2, cd2)};
                for (int j = 0; j < 4; ++j) {
                    const int left = count - k - 16 * j;
                    if (left >= 16) storef(to + k + 16 * j, _mm512_castsi512_ps(part[j]));
                    else storef(to + k + 16 * j, _mm512_castsi512_ps(part[j]), left);
                }
            }
        }
    };

    static EK_INLINE void widen(uint8_t*, const uint8_t*, ptrdiff_t) {}  // kUnit is 1
};

bool here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("fma");
}

bool prepare(Step& s, Store& store) {
    switch (s.type) {
        case OpType::kConv: return prepare_depthwise<Avx512>(s, store) || prepare_dense<Avx512>(s, store);
        default: return prepare_pixels<Avx512>(s, store) || prepare_floats<Avx512>(s, store);
    }
}

}  // namespace

const Isa kAvx512 = {"avx512", here, prepare};

}  // namespace edgekit

#pragma GCC pop_options

#endif
