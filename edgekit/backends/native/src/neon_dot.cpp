// aarch64 with the dot product instructions of Armv8.2 (Cortex-A55, A76, Neoverse N1, Apple A13 and later).
#if defined(__aarch64__)
#include <cstring>
#include <new>

#include "kernels.h"
#include "neon_cpu.h"

#pragma GCC optimize("O3")  // a tenth fewer instructions than with O2
#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>

namespace edgekit {
namespace {

constexpr int kFlip = 0x80;  // SDOT: signed by signed

inline __attribute__((always_inline)) int32x4_t dot(int32x4_t acc, int8x16_t codes, int8x16_t weights) {
    return vdotq_s32(acc, codes, weights);
}

}  // namespace
}  // namespace edgekit

#define EK_RDM
#define EK_DOT "sdot"
#define EK_DOTS "sdot"
#define EK_FLIPS(each) each
#include "neon_dots.h"

namespace edgekit {

const Isa kNeonDot = {"neon_dot", has_dot_products, prepare};

}  // namespace edgekit
#endif
