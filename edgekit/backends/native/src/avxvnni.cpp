// AVX2 with VNNI in 256 bits: Alder Lake, Zen 5 and later.
#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>
#include <new>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")

#include "codes.h"
#include "dense.h"
#include "depthwise.h"
#include "vec256.h"

namespace edgekit {
namespace {

struct AvxVnni : Vec256 {
    static constexpr int kUnit = 1;
    // asm: gcc moves and spills the sums around the intrinsic
    static EK_INLINE void dot(I& sum, I a, I w) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(w)); }
    static constexpr int kQuad = 32;
    using Quad = I;
    static EK_INLINE Quad quad(const uint8_t* p) { return load(p); }
    static EK_INLINE void dot_quad(I& sum, I a, const Quad& w) { dot(sum, a, w); }
    static EK_INLINE void dot_quad(I& sum, I a, const uint8_t* w) { dot(sum, a, load(w)); }
    static void put_quad(uint8_t* vector, int lane, int row, int8_t w) { vector[4 * lane + row] = static_cast<uint8_t>(w); }
    static EK_INLINE void widen(uint8_t*, const uint8_t*, ptrdiff_t) {}  // kUnit is 1
};

bool here() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    return vnni && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// All but convolutions is left to avx2.cpp, which every such CPU runs as well.
bool prepare(Step& s, Store& store) {
    return s.type == OpType::kConv && (prepare_depthwise<AvxVnni>(s, store) || prepare_dense<AvxVnni>(s, store));
}

}  // namespace

const Isa kAvxVnni = {"avxvnni", here, prepare};

}  // namespace edgekit

#pragma GCC pop_options

#endif
