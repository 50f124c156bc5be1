// aarch64 with the int8 extension of Armv8.6 (Cortex-A510, A710, X2, Neoverse V1 and later): bytes of a picture stay unsigned.
#if defined(__aarch64__)
#include <cstring>
#include <new>

#include "kernels.h"
#include "neon_cpu.h"

#pragma GCC optimize("O3")  // a tenth fewer instructions than with O2
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#include <arm_neon.h>

namespace edgekit {
namespace {

constexpr int kFlip = 0;  // USDOT: unsigned by signed

inline __attribute__((always_inline)) int32x4_t dot(int32x4_t acc, int8x16_t codes, int8x16_t weights) {
    return vusdotq_s32(acc, vreinterpretq_u8_s8(codes), weights);
}

}  // namespace
}  // namespace edgekit

#define EK_RDM
#define EK_DOT "sudot"
#define EK_DOTS "usdot"
#define EK_FLIPS(each)
#include "neon_dots.h"

namespace edgekit {

const Isa kNeonI8mm = {"neon_i8mm", has_i8mm, prepare};

}  // namespace edgekit
#endif
