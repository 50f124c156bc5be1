// Small parts that the aarch64 kernels share. Included by one file per instruction set: all names are that file's own.
#pragma once

#include <arm_neon.h>

#include "functions.h"

#define EK_LIKELY(x) __builtin_expect(!!(x), 1)

namespace edgekit {
namespace {

// std's are templates that all files would share, each made for its own CPU
EK_INLINE int min(int a, int b) { return a < b ? a : b; }
EK_INLINE int max(int a, int b) { return a > b ? a : b; }

EK_INLINE void copy_bytes(uint8_t* to, const uint8_t* from, int count) {
    if (count & 8) std::memcpy(to, from, 8), to += 8, from += 8;
    if (count & 4) std::memcpy(to, from, 4), to += 4, from += 4;
    if (count & 2) std::memcpy(to, from, 2), to += 2, from += 2;
    if (count & 1) *to = *from;
    if (count & 16) std::memcpy(to, from, 16);
}

__attribute__((noinline, cold)) inline void store_few(uint8_t* to, uint8x16_t v, int count) {
    uint8_t bytes[16];
    vst1q_u8(bytes, v);
    copy_bytes(to, bytes, count);
}

// The first `count` bytes of v, all where there are more.
EK_INLINE void store_some(uint8_t* to, uint8x16_t v, int count) {
    if (EK_LIKELY(count >= 16)) vst1q_u8(to, v);
    else store_few(to, v, count);
}

EK_INLINE void fill_bytes(int8_t* to, int8_t value, int count) {
    if (count > 0) std::memset(to, value, static_cast<size_t>(count));
}

// Tables fill 16 registers in a row, and the compiler would keep them in memory once it has too few: so they are loaded for a
// few vectors at a time, in one piece of assembly.
#define EK_TABLE_REGISTERS                                                                                              \
    "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "memory"
#define EK_LOAD_TABLE(at)                                                                       \
    "ld1 {v16.16b-v19.16b}, [" at "], #64\n ld1 {v20.16b-v23.16b}, [" at "], #64\n"             \
    "ld1 {v24.16b-v27.16b}, [" at "], #64\n ld1 {v28.16b-v31.16b}, [" at "]\n"
#define EK_LOOK_UP(to, code)                                                                                            \
    "tbl " to ".16b, {v16.16b-v19.16b}, " code ".16b\n sub " code ".16b, " code ".16b, %[quarter].16b\n"                 \
    "tbx " to ".16b, {v20.16b-v23.16b}, " code ".16b\n sub " code ".16b, " code ".16b, %[quarter].16b\n"                 \
    "tbx " to ".16b, {v24.16b-v27.16b}, " code ".16b\n sub " code ".16b, " code ".16b, %[quarter].16b\n"                 \
    "tbx " to ".16b, {v28.16b-v31.16b}, " code ".16b\n"

// codes[i] = table[codes[i]]
#define EK_LOOKED_UP(...) : __VA_ARGS__, "+r"(table) : [quarter] "w"(vdupq_n_u8(64)) : EK_TABLE_REGISTERS
template <int kCount> EK_INLINE void look_up(const uint8_t* table, uint8x16_t (&codes)[kCount]) {
    static_assert(kCount <= 4 || kCount == 6, "one of those below");
    // names, not an array: that would be kept in memory, too
    uint8x16_t q0, q1, q2, q3, q4, q5, c0 = codes[0], c1 = codes[1 % kCount], c2 = codes[2 % kCount], c3 = codes[3 % kCount], c4 = codes[4 % kCount],
                                       c5 = codes[5 % kCount];
    if constexpr (kCount == 1)
        asm volatile(EK_LOAD_TABLE("%2") EK_LOOK_UP("%0", "%1") EK_LOOKED_UP("=&w"(q0), "+w"(c0)));
    if constexpr (kCount == 2)
        asm volatile(EK_LOAD_TABLE("%4") EK_LOOK_UP("%0", "%2") EK_LOOK_UP("%1", "%3") EK_LOOKED_UP("=&w"(q0), "=&w"(q1), "+w"(c0), "+w"(c1)));
    if constexpr (kCount == 3)
        asm volatile(EK_LOAD_TABLE("%6") EK_LOOK_UP("%0", "%3") EK_LOOK_UP("%1", "%4") EK_LOOK_UP("%2", "%5")
                     EK_LOOKED_UP("=&w"(q0), "=&w"(q1), "=&w"(q2), "+w"(c0), "+w"(c1), "+w"(c2)));
    if constexpr (kCount == 4)
        asm volatile(EK_LOAD_TABLE("%8") EK_LOOK_UP("%0", "%4") EK_LOOK_UP("%1", "%5") EK_LOOK_UP("%2", "%6") EK_LOOK_UP("%3", "%7")
                     EK_LOOKED_UP("=&w"(q0), "=&w"(q1), "=&w"(q2), "=&w"(q3), "+w"(c0), "+w"(c1), "+w"(c2), "+w"(c3)));
    if constexpr (kCount == 6)
        asm volatile(EK_LOAD_TABLE("%12") EK_LOOK_UP("%0", "%6") EK_LOOK_UP("%1", "%7") EK_LOOK_UP("%2", "%8") EK_LOOK_UP("%3", "%9")
                     EK_LOOK_UP("%4", "%10") EK_LOOK_UP("%5", "%11")
                     EK_LOOKED_UP("=&w"(q0), "=&w"(q1), "=&w"(q2), "=&w"(q3), "=&w"(q4), "=&w"(q5), "+w"(c0), "+w"(c1), "+w"(c2), "+w"(c3),
                                  "+w"(c4), "+w"(c5)));
    codes[0] = q0;
    if constexpr (kCount > 1) codes[1] = q1;
    if constexpr (kCount > 2) codes[2] = q2;
    if constexpr (kCount > 3) codes[3] = q3;
    if constexpr (kCount > 4) codes[4] = q4, codes[5] = q5;
}

// The same for `count` vectors that lie in a row, each put `pitch` bytes behind the one before.
inline void look_up_all(const uint8_t* table, const uint8_t* from, int count, uint8_t* to, ptrdiff_t pitch) {
    asm volatile(EK_LOAD_TABLE("%[table]")
                 "subs %w[count], %w[count], #4\n b.lt 2f\n"
                 "1: ld1 {v0.16b-v3.16b}, [%[from]], #64\n"
                 EK_LOOK_UP("v4", "v0") EK_LOOK_UP("v5", "v1") EK_LOOK_UP("v6", "v2") EK_LOOK_UP("v7", "v3")
                 "subs %w[count], %w[count], #4\n"
                 "st1 {v4.16b}, [%[to]], %[pitch]\n st1 {v5.16b}, [%[to]], %[pitch]\n"
                 "st1 {v6.16b}, [%[to]], %[pitch]\n st1 {v7.16b}, [%[to]], %[pitch]\n"
                 "b.ge 1b\n"
                 "2: adds %w[count], %w[count], #4\n b.eq 4f\n"
                 "3: ldr q0, [%[from]], #16\n" EK_LOOK_UP("v4", "v0")
                 "subs %w[count], %w[count], #1\n st1 {v4.16b}, [%[to]], %[pitch]\n b.ne 3b\n 4:\n"
                 : [table] "+r"(table), [from] "+r"(from), [count] "+r"(count), [to] "+r"(to)
                 : [pitch] "r"(pitch), [quarter] "w"(vdupq_n_u8(64))
                 : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "cc", EK_TABLE_REGISTERS);
}

EK_INLINE uint8x16_t look_up(const uint8_t* table, uint8x16_t code) {
    uint8x16_t codes[1] = {code};
    look_up<1>(table, codes);
    return codes[0];
}

EK_INLINE uint8x16_t pack_codes(int16x8_t low, int16x8_t high) {
    uint8x16_t q;  // the compiler would copy the lower half
    asm("sqxtun %0.8b, %1.8h\n sqxtun2 %0.16b, %2.8h" : "=&w"(q) : "w"(low), "w"(high));
    return q;
}

EK_INLINE int16x8_t narrow(int32x4_t low, int32x4_t high) {
    int16x8_t r;
    asm("sqxtn %0.4h, %1.4s\n sqxtn2 %0.8h, %2.4s" : "=&w"(r) : "w"(low), "w"(high));
    return r;
}

// --- codes as real numbers, and back ---

struct Reals {
    float32x4_t v[4];
};

// float(code - zero). A code becomes the low byte of 2^23 + code, which the difference makes exact.
struct Centered {
    uint8x16_t first, exponent;
    float32x4_t zero;
    explicit Centered(int z)
        : first(vreinterpretq_u8_u32(uint32x4_t{0x10ffff00, 0x10ffff01, 0x10ffff02, 0x10ffff03})), exponent(vdupq_n_u8(0x4b)),
          zero(vdupq_n_f32(8388608.0f + static_cast<float>(z))) {}
    EK_INLINE Reals operator()(uint8x16_t code) const {
        register uint8x16_t q asm("v16") = code;
        register uint8x16_t e asm("v17") = exponent;
        const uint8x16_t i1 = next(1), i2 = next(2), i3 = next(3);
        Reals r;
        asm("tbl %0.16b, {v16.16b, v17.16b}, %4.16b\n tbl %1.16b, {v16.16b, v17.16b}, %5.16b\n"
            "tbl %2.16b, {v16.16b, v17.16b}, %6.16b\n tbl %3.16b, {v16.16b, v17.16b}, %7.16b\n"
            : "=&w"(r.v[0]), "=&w"(r.v[1]), "=&w"(r.v[2]), "=&w"(r.v[3]) : "w"(first), "w"(i1), "w"(i2), "w"(i3), "w"(q), "w"(e));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) r.v[i] = vsubq_f32(r.v[i], zero);
        return r;
    }

  private:
    EK_INLINE uint8x16_t next(int by) const {  // the codes of lanes 4 * by and on
        return vreinterpretq_u8_u32(vaddq_u32(vreinterpretq_u32_u8(first), vdupq_n_u32(static_cast<uint32_t>(4 * by))));
    }
};

// sat8u(rne(real) + zero)
enum class Round { kAny, kEven, kOdd };
template <Round kRound> struct Rounded {
    float32x4_t magic;
    int16x8_t zero;
    explicit Rounded(int z) : magic(vdupq_n_f32(12582912.0f + static_cast<float>(z & ~1))), zero(vdupq_n_s16(static_cast<int16_t>(z))) {}
    EK_INLINE uint8x16_t operator()(const Reals& r) const {
        if constexpr (kRound == Round::kAny)
            return pack_codes(vqaddq_s16(narrow(vcvtnq_s32_f32(r.v[0]), vcvtnq_s32_f32(r.v[1])), zero),
                              vqaddq_s16(narrow(vcvtnq_s32_f32(r.v[2]), vcvtnq_s32_f32(r.v[3])), zero));
        int16x8_t low = half(r.v[0], r.v[1]), high = half(r.v[2], r.v[3]);
        if (kRound == Round::kOdd) low = vaddq_s16(low, vdupq_n_s16(1)), high = vaddq_s16(high, vdupq_n_s16(1));
        return pack_codes(low, high);
    }

  private:
    // 1.5 * 2^23 + an even number rounds as rne() does, and leaves the integer in the low bits
    EK_INLINE int16x8_t half(float32x4_t a, float32x4_t b) const {
        return vuzp1q_s16(vreinterpretq_s16_f32(vaddq_f32(a, magic)), vreinterpretq_s16_f32(vaddq_f32(b, magic)));
    }
};

// Calls each(rounded) with the quickest that serves: `most` is the largest |real|.
template <typename Each> EK_INLINE void with_rounding(int zero, float most, Each each) {
    if (!(most < 32000.0f)) return each(Rounded<Round::kAny>(zero));
    if (zero & 1) return each(Rounded<Round::kOdd>(zero));
    each(Rounded<Round::kEven>(zero));
}

// sat8u(rne(float(a - za) * sa + float(b - zb) * sb) + zero)
template <typename Rounding> struct Sum {
    Centered a_codes, b_codes;
    float32x4_t sa, sb;
    Rounding rounding;
    EK_INLINE uint8x16_t operator()(uint8x16_t a, uint8x16_t b) const {
        Reals x = a_codes(a);
        const Reals y = b_codes(b);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) x.v[i] = vaddq_f32(vmulq_f32(x.v[i], sa), vmulq_f32(y.v[i], sb));
        return rounding(x);
    }
};

template <typename Each> EK_INLINE void with_sum(int za, int zb, float sa, float sb, int zero, Each each) {
    const float most = 255.0f * (__builtin_fabsf(sa) + __builtin_fabsf(sb));
    with_rounding(zero, most, [&](auto rounding) { each(Sum<decltype(rounding)>{Centered(za), Centered(zb), vdupq_n_f32(sa), vdupq_n_f32(sb), rounding}); });
}

}  // namespace
}  // namespace edgekit
