// Pointwise convolutions by dot products: tiles of six pixels and up to 16 output channels, from pixels that lie interleaved.
// Included by neon_dots.h; EK_DOT is the instruction that multiplies weights by four codes of one lane.
//
// Packed, six pixels are [8 channels][4 channels][pixel][byte]: three registers hold 8 channels of all six. Weights follow
// their bias, [4 channels][output][byte]. So all that a tile needs lies in the order in which it is used.
#pragma once

#include "neon_tile.h"

namespace edgekit {
namespace {

constexpr int kSix = 6;

#define EK_LANE(sum, weights, codes) EK_DOT " v" #sum ".4s, v" #weights ".16b, v" codes "\n"
#define EK_EVEN(a, b, c, d, e, f, w) \
    EK_LANE(a, w, "24.4b[0]") EK_LANE(b, w, "24.4b[1]") EK_LANE(c, w, "24.4b[2]") EK_LANE(d, w, "24.4b[3]") EK_LANE(e, w, "25.4b[0]") EK_LANE(f, w, "25.4b[1]")
#define EK_ODD(a, b, c, d, e, f, w) \
    EK_LANE(a, w, "25.4b[2]") EK_LANE(b, w, "25.4b[3]") EK_LANE(c, w, "26.4b[0]") EK_LANE(d, w, "26.4b[1]") EK_LANE(e, w, "26.4b[2]") EK_LANE(f, w, "26.4b[3]")
#define EK_STEP(weights, even, odd) "ld1 {v24.16b-v26.16b}, [%[a]], #48\n" weights even weights odd
#define EK_STEPS(weights, even, odd)                                                                        \
    "tbz %w[steps], #0, 1f\n" EK_STEP(weights, even, odd) "subs %w[steps], %w[steps], #1\n b.eq 2f\n"       \
    "1:\n" EK_STEP(weights, even, odd) EK_STEP(weights, even, odd) "subs %w[steps], %w[steps], #2\n b.ne 1b\n 2:\n"
#define EK_SUM(i) "=w"(s##i)
#define EK_MOVING [a] "+r"(a), [w] "+r"(w), [steps] "+r"(steps) : : "v24", "v25", "v26", "v28", "v29", "v30", "v31", "cc", "memory"

#define EK_EVEN_PAIR(a, b, w) EK_LANE(a, w, "24.4b[0]") EK_LANE(b, w, "24.4b[1]")
#define EK_ODD_PAIR(a, b, w) EK_LANE(a, w, "25.4b[2]") EK_LANE(b, w, "25.4b[3]")

// Sums of six pixels, from `steps` times 8 channels. One piece of assembly: the compiler does not know of loads of several
// registers, and would keep sums in memory.
template <int kQuads> EK_INLINE void six(const int8_t* a, const int8_t* w, int steps, int32x4_t (*acc)[kQuads]) {
    register int32x4_t s0 asm("v0"), s1 asm("v1"), s2 asm("v2"), s3 asm("v3"), s4 asm("v4"), s5 asm("v5"), s6 asm("v6"), s7 asm("v7"),
        s8 asm("v8"), s9 asm("v9"), s10 asm("v10"), s11 asm("v11"), s12 asm("v12"), s13 asm("v13"), s14 asm("v14"), s15 asm("v15"),
        s16 asm("v16"), s17 asm("v17"), s18 asm("v18"), s19 asm("v19"), s20 asm("v20"), s21 asm("v21"), s22 asm("v22"), s23 asm("v23");
    if constexpr (kQuads == 1) {
        asm volatile("ldr q0, [%[w]], #16\n mov v1.16b, v0.16b\n mov v2.16b, v0.16b\n mov v3.16b, v0.16b\n"
                     "mov v4.16b, v0.16b\n mov v5.16b, v0.16b\n"
                     EK_STEPS("ldr q28, [%[w]], #16\n", EK_EVEN(0, 1, 2, 3, 4, 5, 28), EK_ODD(0, 1, 2, 3, 4, 5, 28))
                     : EK_SUM(0), EK_SUM(1), EK_SUM(2), EK_SUM(3), EK_SUM(4), EK_SUM(5), EK_MOVING);
    } else if constexpr (kQuads == 2) {
        asm volatile("ld1 {v0.4s-v1.4s}, [%[w]]\n ld1 {v2.4s-v3.4s}, [%[w]]\n ld1 {v4.4s-v5.4s}, [%[w]]\n ld1 {v6.4s-v7.4s}, [%[w]]\n"
                     "ld1 {v8.4s-v9.4s}, [%[w]]\n ld1 {v10.4s-v11.4s}, [%[w]], #32\n"
                     EK_STEPS("ld1 {v28.16b-v29.16b}, [%[w]], #32\n",
                              EK_EVEN(0, 2, 4, 6, 8, 10, 28) EK_EVEN(1, 3, 5, 7, 9, 11, 29),
                              EK_ODD(0, 2, 4, 6, 8, 10, 28) EK_ODD(1, 3, 5, 7, 9, 11, 29))
                     : EK_SUM(0), EK_SUM(1), EK_SUM(2), EK_SUM(3), EK_SUM(4), EK_SUM(5), EK_SUM(6), EK_SUM(7), EK_SUM(8), EK_SUM(9),
                       EK_SUM(10), EK_SUM(11), EK_MOVING);
    } else if constexpr (kQuads == 3) {
        asm volatile("ld1 {v0.4s-v2.4s}, [%[w]]\n ld1 {v3.4s-v5.4s}, [%[w]]\n ld1 {v6.4s-v8.4s}, [%[w]]\n ld1 {v9.4s-v11.4s}, [%[w]]\n"
                     "ld1 {v12.4s-v14.4s}, [%[w]]\n ld1 {v15.4s-v17.4s}, [%[w]], #48\n"
                     EK_STEPS("ld1 {v28.16b-v30.16b}, [%[w]], #48\n",
                              EK_EVEN(0, 3, 6, 9, 12, 15, 28) EK_EVEN(1, 4, 7, 10, 13, 16, 29) EK_EVEN(2, 5, 8, 11, 14, 17, 30),
                              EK_ODD(0, 3, 6, 9, 12, 15, 28) EK_ODD(1, 4, 7, 10, 13, 16, 29) EK_ODD(2, 5, 8, 11, 14, 17, 30))
                     : EK_SUM(0), EK_SUM(1), EK_SUM(2), EK_SUM(3), EK_SUM(4), EK_SUM(5), EK_SUM(6), EK_SUM(7), EK_SUM(8), EK_SUM(9),
                       EK_SUM(10), EK_SUM(11), EK_SUM(12), EK_SUM(13), EK_SUM(14), EK_SUM(15), EK_SUM(16), EK_SUM(17), EK_MOVING);
    } else {
        asm volatile("ld1 {v0.4s-v3.4s}, [%[w]]\n ld1 {v4.4s-v7.4s}, [%[w]]\n ld1 {v8.4s-v11.4s}, [%[w]]\n ld1 {v12.4s-v15.4s}, [%[w]]\n"
                     "ld1 {v16.4s-v19.4s}, [%[w]]\n ld1 {v20.4s-v23.4s}, [%[w]], #64\n"
                     EK_STEPS("ld1 {v28.16b-v31.16b}, [%[w]], #64\n",
                              EK_EVEN(0, 4, 8, 12, 16, 20, 28) EK_EVEN(1, 5, 9, 13, 17, 21, 29)
                              EK_EVEN(2, 6, 10, 14, 18, 22, 30) EK_EVEN(3, 7, 11, 15, 19, 23, 31),
                              EK_ODD(0, 4, 8, 12, 16, 20, 28) EK_ODD(1, 5, 9, 13, 17, 21, 29)
                              EK_ODD(2, 6, 10, 14, 18, 22, 30) EK_ODD(3, 7, 11, 15, 19, 23, 31))
                     : EK_SUM(0), EK_SUM(1), EK_SUM(2), EK_SUM(3), EK_SUM(4), EK_SUM(5), EK_SUM(6), EK_SUM(7), EK_SUM(8), EK_SUM(9),
                       EK_SUM(10), EK_SUM(11), EK_SUM(12), EK_SUM(13), EK_SUM(14), EK_SUM(15), EK_SUM(16), EK_SUM(17), EK_SUM(18),
                       EK_SUM(19), EK_SUM(20), EK_SUM(21), EK_SUM(22), EK_SUM(23), EK_MOVING);
    }
    const int32x4_t sums[24] = {s0,  s1,  s2,  s3,  s4,  s5,  s6,  s7,  s8,  s9,  s10, s11,
                                s12, s13, s14, s15, s16, s17, s18, s19, s20, s21, s22, s23};
#pragma GCC unroll 24
    for (int i = 0; i < kSix * kQuads; i++) acc[i / kQuads][i % kQuads] = sums[i];
}

// The first two of six pixels, 13 to 16 channels.
EK_INLINE void two(const int8_t* a, const int8_t* w, int steps, int32x4_t (&acc)[2][4]) {
    register int32x4_t s0 asm("v0"), s1 asm("v1"), s2 asm("v2"), s3 asm("v3"), s4 asm("v4"), s5 asm("v5"), s6 asm("v6"), s7 asm("v7");
    asm volatile("ld1 {v0.4s-v3.4s}, [%[w]]\n ld1 {v4.4s-v7.4s}, [%[w]], #64\n"
                 EK_STEPS("ld1 {v28.16b-v31.16b}, [%[w]], #64\n",
                          EK_EVEN_PAIR(0, 4, 28) EK_EVEN_PAIR(1, 5, 29) EK_EVEN_PAIR(2, 6, 30) EK_EVEN_PAIR(3, 7, 31),
                          EK_ODD_PAIR(0, 4, 28) EK_ODD_PAIR(1, 5, 29) EK_ODD_PAIR(2, 6, 30) EK_ODD_PAIR(3, 7, 31))
                 : EK_SUM(0), EK_SUM(1), EK_SUM(2), EK_SUM(3), EK_SUM(4), EK_SUM(5), EK_SUM(6), EK_SUM(7), EK_MOVING);
    acc[0][0] = s0, acc[0][1] = s1, acc[0][2] = s2, acc[0][3] = s3;
    acc[1][0] = s4, acc[1][1] = s5, acc[1][2] = s6, acc[1][3] = s7;
}

// Six pixels from `parts` times 16 channels, interleaved. Reads up to 15 bytes too far.
EK_INLINE void pack_six(const uint8_t* const (&from)[kSix], int8_t* to, int parts) {
    const uint8_t *p0 = from[0], *p1 = from[1], *p2 = from[2], *p3 = from[3], *p4 = from[4], *p5 = from[5];
#define EK_FLIP(r) "eor v" #r ".16b, v" #r ".16b, %[flip].16b\n"
#define EK_WEAVE(a, b, c, d, e, f)                                                                                         \
    "zip1 v16.4s, v" #a ".4s, v" #b ".4s\n zip1 v17.4s, v" #c ".4s, v" #d ".4s\n zip1 v18.4s, v" #e ".4s, v" #f ".4s\n"     \
    "zip2 v19.4s, v" #a ".4s, v" #b ".4s\n zip2 v20.4s, v" #c ".4s, v" #d ".4s\n zip2 v21.4s, v" #e ".4s, v" #f ".4s\n"     \
    "st3 {v16.2d-v18.2d}, [%[to]], #48\n st3 {v19.2d-v21.2d}, [%[to]], #48\n"
#define EK_PACKING                                                                                                        \
    : [p0] "+r"(p0), [p1] "+r"(p1), [p2] "+r"(p2), [p3] "+r"(p3), [p4] "+r"(p4), [p5] "+r"(p5), [to] "+r"(to)                \
    : [flip] "w"(vdupq_n_u8(kFlip))                                                                                       \
    : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v16", "v17", "v18", "v19", "v20", "v21", "memory"
    for (; parts >= 2; parts -= 2) {
        asm volatile("ldp q0, q6, [%[p0]], #32\n ldp q1, q7, [%[p1]], #32\n ldp q2, q8, [%[p2]], #32\n"
                     "ldp q3, q9, [%[p3]], #32\n ldp q4, q10, [%[p4]], #32\n ldp q5, q11, [%[p5]], #32\n"
                     EK_FLIPS(EK_FLIP(0) EK_FLIP(1) EK_FLIP(2) EK_FLIP(3) EK_FLIP(4) EK_FLIP(5)) EK_WEAVE(0, 1, 2, 3, 4, 5)
                     EK_FLIPS(EK_FLIP(6) EK_FLIP(7) EK_FLIP(8) EK_FLIP(9) EK_FLIP(10) EK_FLIP(11)) EK_WEAVE(6, 7, 8, 9, 10, 11)
                     EK_PACKING);
    }
    if (parts)
        asm volatile("ldr q0, [%[p0]]\n ldr q1, [%[p1]]\n ldr q2, [%[p2]]\n ldr q3, [%[p3]]\n ldr q4, [%[p4]]\n ldr q5, [%[p5]]\n"
                     EK_FLIPS(EK_FLIP(0) EK_FLIP(1) EK_FLIP(2) EK_FLIP(3) EK_FLIP(4) EK_FLIP(5)) EK_WEAVE(0, 1, 2, 3, 4, 5)
                     EK_PACKING);
}

// Pixels [at, at + count) of the output, from where their channels begin in a packed six.
inline void pack_sixes(const Step& step, const View& in, const uint8_t* from, int at, int count, int8_t* to, ptrdiff_t six_bytes) {
    const View& out = step.out[0];
    const int parts = (in.c + 15) / 16;
    const bool plain = step.stride[0] == 1 && step.stride[1] == 1;
    const uint8_t* p[kSix];
    if (plain) {
        const uint8_t* next = from + at * in.pitch;
        for (; count >= kSix; count -= kSix, at += kSix, to += six_bytes) {
#pragma GCC unroll 6
            for (int i = 0; i < kSix; i++) p[i] = next, next += in.pitch;
            pack_six(p, to, parts);
        }
    }
    for (; count > 0; count -= kSix, at += kSix, to += six_bytes) {
        for (int i = 0; i < kSix; i++) {  // the last one again where there is none
            const int pixel = at + min(i, count - 1), line = pixel / out.w, x = pixel % out.w;
            const ptrdiff_t row = static_cast<ptrdiff_t>(line / out.h) * in.h + line % out.h * step.stride[0];
            p[i] = from + (row * in.w + x * step.stride[1]) * in.pitch;
        }
        pack_six(p, to, parts);
    }
}

template <Mode kMode, int kQuads>
__attribute__((noinline)) void six_block(const Conv& conv, const int8_t* weights, const int8_t* packed, int count, Target to) {
    constexpr int kTiles = kQuads == 1 ? 2 : 1, kRows = kTiles * kSix, kWide = kQuads == 3 ? 16 : 4 * kQuads;
    const bool whole = to.valid == 4 * kQuads;
    const ptrdiff_t six_bytes = kSix * conv.depth;
    const int steps = conv.groups / 2;
    for (; count > (kQuads == 4 ? 2 : 0); count -= kRows) {
        int32x4_t acc[kRows][kQuads];
        for (int i = 0; i < kTiles; i++, packed += six_bytes) six<kQuads>(packed, weights, steps, acc + i * kSix);
        if (EK_LIKELY(whole && count >= kRows)) emit<kMode, kRows, kQuads>(acc, to);
        else emit_part<kMode, kRows, kQuads>(acc, to, count);
        advance<kMode>(to, kRows, kWide);
    }
    if constexpr (kQuads == 4)
        if (count > 0) {
            int32x4_t acc[2][4];
            two(packed, weights, steps, acc);
            emit_part<kMode, 2, 4>(acc, to, count);
        }
}

template <Mode kMode> void run_sixes(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& conv = *static_cast<const Conv*>(step.prepared);
    int8_t* packed = reinterpret_cast<int8_t*>(scratch);
    const auto pack = [&](const View& in, int at, int count, int channel) {
        pack_sixes(step, in, frame.bytes(in), at, count, packed + kSix * channel, kSix * conv.depth);
    };
    by_chunks(step, conv, begin, end, pack, [&](int number, int at, int count) {
        const Target to = target<kMode>(step, conv, frame, 0, number, at, scratch);
        const int8_t* weights = conv.weights + number * conv.block_bytes;
        switch ((to.valid + 3) / 4) {
            case 1: six_block<kMode, 1>(conv, weights, packed, count, to); break;
            case 2: six_block<kMode, 2>(conv, weights, packed, count, to); break;
            case 3: six_block<kMode, 3>(conv, weights, packed, count, to); break;
            default: six_block<kMode, 4>(conv, weights, packed, count, to);
        }
        finish_channels<kMode>(step, conv, frame, 0, number, at, count, to);
    });
}

}  // namespace
}  // namespace edgekit
