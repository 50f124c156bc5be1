// What the aarch64 convolutions share: everything but the innermost sums, which a `Core` brings (neon_dots.h, neon.cpp).
//
// A convolution first copies what a unit reads into scratch: as int8 (code - 128), padded, pixels densely packed (neon_run.h;
// some read the picture as it lies: neon_pointwise.h, neon_depthwise.h). Then tiles of some pixels and up to 16 output channels
// are summed (neon_tile.h); a sum leaves its tile as a code, a float, or as an int16 for the second pass (neon_finish.h).
//
// Included by one file per instruction set, after its `#pragma GCC target`: all names are that file's own.
#pragma once

#include <arm_neon.h>

#include "neon_floats.h"

namespace edgekit {
namespace {

// How sums leave a tile. kCodes, kTable: by Conv::factors; kRaw: as int16, for finish().
enum class Mode { kCodes, kTable, kCurve, kRaw, kFloats };

constexpr int kLanes = 16;             // output channels of a full block
constexpr int kScratchBytes = 24 << 10;  // of packed input: what a unit aims at

// What prepare() works out for a convolution.
struct Conv {
    Mode mode = Mode::kCodes;
    bool residual = false, depthwise = false, pointwise = false;
    bool sixes = false;        // pointwise: by Core::sixes
    bool three = false;        // depthwise: by Core::three
    int segments = 1;          // runs of contiguous bytes that make one pixel's window
    int segment_bytes = 0;     // of one, without padding
    int groups = 0;            // of one, in Core::kGroup bytes
    int depth = 0;             // pointwise: bytes of a packed pixel
    int second = 0;            // pointwise: where the second input's channels start in it
    int chunk = 0;             // pointwise: pixels of a unit; else: output rows of a unit
    int splits = 1;            // pointwise: parts of the output channels
    int row_bytes = 0;         // of a packed, padded input row
    int rows_in = 0;           // packed rows of a unit
    int slice = 0, slices = 1; // depthwise: channels of a unit
    int blocks = 0;            // of up to 16 output channels, per group
    size_t block_bytes = 0;    // weights of a full block
    size_t group_bytes = 0;    // weights of all blocks of a group
    const ptrdiff_t* offsets = nullptr;  // depthwise: of the taps from a window's first byte
    const ptrdiff_t* jumps = nullptr;    // else: from where a segment was read to, to the next one
    uint8_t* pads = nullptr;             // three: in.c + 15 codes of the pad
    const int8_t* weights = nullptr;
    const int32_t* bias = nullptr;       // per output channel, padded to blocks; with what the zero point adds
    const float* multipliers = nullptr;  // alike
    const int32_t* factors = nullptr;    // alike, times 2^31: kCodes and kTable
    const uint8_t* tables = nullptr;     // 256 bytes, or the curve as four planes of 64
    int zero = 0;                        // of the codes that come from sums, and are looked up in `tables`
    size_t raw_at = 0;                   // in scratch
    size_t codes_at = 0;                 // alike: codes that a residual is added to, 16 bytes a pixel
    bool sums_fit = true;                // no weight is -128 where that matters (Core)
};

inline Conv& conv_of(Store& store) { return *new (store.bytes(sizeof(Conv))) Conv; }

EK_INLINE int32x4_t rounded(int32x4_t sum, float32x4_t m) { return vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(sum), m)); }

// The same for results that fit into int16, by factors that same_steps() (neon_prepare.h) has seen to give the same codes.
EK_INLINE int16x8_t rounded(int32x4_t a, int32x4_t b, int32x4_t fa, int32x4_t fb, int16x8_t zero) {
    return vaddq_s16(vuzp1q_s16(vreinterpretq_s16_s32(vqrdmulhq_s32(a, fa)), vreinterpretq_s16_s32(vqrdmulhq_s32(b, fb))), zero);
}

// How kQuads times four sums leave: as codes that only lack their bounds, or as int16 without the zero point.
template <Mode kMode, int kQuads> struct Multipliers {
    float32x4_t reals[kQuads];
    int32x4_t factors[kQuads];
    int16x8_t zero;
    EK_INLINE Multipliers(const float* m, const int32_t* f, int z) : zero(vdupq_n_s16(static_cast<int16_t>(z))) {
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; i++)
            if constexpr (kWhole) factors[i] = vld1q_s32(f + 4 * i);
            else reals[i] = vld1q_f32(m + 4 * i);
    }
    EK_INLINE int16x8_t operator()(int32x4_t a, int32x4_t b, int i, int j) const {  // sums of quads i and j
        if constexpr (kWhole) return rounded(a, b, factors[i], factors[j], zero);
        else return narrow(rounded(a, reals[i]), rounded(b, reals[j]));
    }

  private:
    static constexpr bool kWhole = kMode == Mode::kCodes || kMode == Mode::kTable;
};

EK_INLINE uint8x16_t codes_of(int16x8_t a, int16x8_t b, int16x8_t zero) {
    return pack_codes(vqaddq_s16(a, zero), vqaddq_s16(b, zero));
}

}  // namespace
}  // namespace edgekit
