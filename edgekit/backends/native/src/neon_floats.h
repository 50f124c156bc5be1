// Vectors of four floats, for the float32 operators and activations that all sets share (floats.h, functions.h).
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "floats.h"
#include "neon_common.h"

namespace edgekit {
namespace {

struct Vec128 {
    using I = int32x4_t;
    using F = float32x4_t;
    static constexpr int kLanes = 4, kBytes = 16;
    static constexpr int kWidest = 4;

    static EK_INLINE F loadf(const float* p) { return vld1q_f32(p); }
    static EK_INLINE F loadf(const float* p, int count) {  // the first ones; 0 behind
        if (EK_LIKELY(count >= 4)) return loadf(p);
        float lanes[4] = {};
        for (int i = 0; i < count; i++) lanes[i] = p[i];
        return loadf(lanes);
    }
    static EK_INLINE void storef(float* p, F v) { vst1q_f32(p, v); }
    static EK_INLINE void storef(float* p, F v, int count) {
        float lanes[4];
        vst1q_f32(lanes, v);
        for (int i = 0; i < min(count, 4); i++) p[i] = lanes[i];
    }
    static EK_INLINE F setf(float x) { return vdupq_n_f32(x); }
    static EK_INLINE F mulf(F a, F b) { return vmulq_f32(a, b); }
    static EK_INLINE F addf(F a, F b) { return vaddq_f32(a, b); }
    static EK_INLINE F subf(F a, F b) { return vsubq_f32(a, b); }
    static EK_INLINE F divf(F a, F b) { return vdivq_f32(a, b); }
    static EK_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static EK_INLINE F maxf(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // as float_math.h has it
    static EK_INLINE F minf(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static EK_INLINE F negf(F a) { return vnegq_f32(a); }
    static EK_INLINE F pick_negative(F x, F yes, F no) { return vbslq_f32(vcltq_f32(x, setf(0.0f)), yes, no); }
    static EK_INLINE F pick_positive(F x, F yes, F no) { return vbslq_f32(vcgeq_f32(x, setf(0.0f)), yes, no); }
    static EK_INLINE F raised(F a, F by) {  // a times 2 to the integer in the low bits
        return vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(by), 23), vreinterpretq_s32_f32(a)));
    }

    // rounded to codes
    static EK_INLINE I held_rne(F a) { return vcvtnq_s32_f32(a); }  // saturates; NaN gives 0
    static EK_INLINE int16x8_t set16(int x) { return vdupq_n_s16(static_cast<int16_t>(x)); }
    static EK_INLINE int16x8_t words(I a, I b) { return narrow(a, b); }
    static EK_INLINE int16x8_t add16(int16x8_t a, int16x8_t b) { return vqaddq_s16(a, b); }
    static EK_INLINE uint8x16_t bytes(int16x8_t a, int16x8_t b) { return pack_codes(a, b); }
    static EK_INLINE uint8x16_t order(uint8x16_t a) { return a; }
    template <int> static EK_INLINE void scatter(uint8_t* p, ptrdiff_t, uint8x16_t v, int count) {
        store_some(p, v, count);
    }
};

}  // namespace
}  // namespace edgekit
