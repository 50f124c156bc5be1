// AVX2. Codes are multiplied as 16-bit numbers: pairs of bytes would saturate.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <new>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "codes.h"
#include "dense.h"
#include "depthwise.h"
#include "floats.h"
#include "pixels.h"
#include "vec256.h"

namespace edgekit {
namespace {

struct Avx2 : Vec256 {
    static constexpr int kUnit = 2;
    static EK_INLINE void dot(I& sum, I a, I w) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, w)); }

    // of four rows: 0 and 2, then 1 and 3
    static constexpr int kQuad = 64;
    struct Quad {
        I even, odd;
    };
    static EK_INLINE Quad quad(const uint8_t* p) { return {load(p), load(p + 32)}; }
    static EK_INLINE void dot_quad(I& sum, I a, const Quad& w) {
        dot(sum, _mm256_and_si256(a, set16(255)), w.even);
        dot(sum, _mm256_srli_epi16(a, 8), w.odd);
    }
    static EK_INLINE void dot_quad(I& sum, I a, const uint8_t* w) { dot_quad(sum, a, quad(w)); }
    static void put_quad(uint8_t* vector, int lane, int row, int8_t w) {
        reinterpret_cast<int16_t*>(vector)[row % 2 * 16 + lane * 2 + row / 2] = w;
    }

    static EK_INLINE void widen(uint8_t* to, const uint8_t* from, ptrdiff_t count) {
        for (; count >= 16; count -= 16, from += 16, to += 32) store(to, _mm256_cvtepu8_epi16(half(from)));
        if (count >= 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_cvtepu8_epi16(eight(from)));
            count -= 8, from += 8, to += 16;
        }
        for (; count > 0; --count, ++from, to += 2) to[0] = *from, to[1] = 0;
    }
};

bool here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool prepare(Step& s, Store& store) {
    switch (s.type) {
        case OpType::kConv: return prepare_depthwise<Avx2>(s, store) || prepare_dense<Avx2>(s, store);
        default: return prepare_pixels<Avx2>(s, store) || prepare_floats<Avx2>(s, store);
    }
}

}  // namespace

const Isa kAvx2 = {"avx2", here, prepare};

}  // namespace edgekit

#pragma GCC pop_options

#endif
