// Vectors of the compiler (GCC, Clang), one source for every instruction set: a body is written once over
// V<B>, vectors of B bytes, and LANES makes a function of it per instruction set. Each operation rounds as
// the scalar one does, so all of them give the same bits.
#pragma once

#include "isa.h"

#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define EDGEKIT_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define EDGEKIT_AVX2 __attribute__((target("avx2")))
// An instruction set's version of `name<B>`, as a function pointer.
#define EDGEKIT_LANES(result, name, parameters, arguments)                              \
    inline result name##_narrow parameters { return name<16> arguments; }               \
    EDGEKIT_AVX2 inline result name##_wide parameters { return name<32> arguments; }
#define EDGEKIT_PICK(name, isa) ((isa) == Isa::avx2 ? name##_wide : name##_narrow)
#else
#define EDGEKIT_LANES(result, name, parameters, arguments) \
    inline result name##_narrow parameters { return name<16> arguments; }
#define EDGEKIT_PICK(name, isa) (static_cast<void>(isa), name##_narrow)
#endif

namespace edgekit {

template <int B>
struct V {
    typedef float F __attribute__((vector_size(B)));
    typedef int32_t I __attribute__((vector_size(B)));
    typedef uint32_t W __attribute__((vector_size(B)));
    typedef double D __attribute__((vector_size(B)));
    typedef uint64_t U __attribute__((vector_size(B)));
    static constexpr int kFloats = B / 4, kDoubles = B / 8;
};

template <class T>
EDGEKIT_INLINE T load(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
EDGEKIT_INLINE void store(void* p, const T& v) {
    std::memcpy(p, &v, sizeof v);
}

// Whether any lane of a comparison's result is set.
template <int B>
EDGEKIT_INLINE bool any(const typename V<B>::I& mask) {
    uint64_t parts[B / 8], all = 0;
    std::memcpy(parts, &mask, B);
    for (int k = 0; k < B / 8; k++) all |= parts[k];
    return all != 0;
}

}  // namespace edgekit
