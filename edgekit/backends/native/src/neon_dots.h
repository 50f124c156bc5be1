// The sums of convolutions by dot product instructions. The including file brings, after its `#pragma GCC target`,
// kFlip (0x80 where bytes of both sides are signed, 0 where pictures stay u8), dot(), and the instructions: EK_DOTS takes vectors of
// codes and weights, EK_DOT weights and four codes of one lane.
#pragma once

#include "neon_depthwise.h"
#include "neon_ops.h"
#include "neon_pointwise.h"
#include "neon_prepare.h"

namespace edgekit {
namespace {

template <int kLane> EK_INLINE void dot_lane(int32x4_t& acc, int8x16_t weights, int8x16_t codes) {
    asm volatile(EK_DOT " %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(weights), "w"(codes), "i"(kLane));
}

struct Dots {
    static constexpr int kFlip = edgekit::kFlip;
    static constexpr bool kSixes = true;
    template <Mode kMode> static constexpr Run sixes() { return run_sixes<kMode>; }
    static bool three(const Step& step) { return is_three(step); }
    static void prepare_three(Step& step, Conv& conv, Store& store) { edgekit::prepare_three(step, conv, store); }
    template <Mode kMode> static constexpr Run three() { return run_three<kMode>; }
    static constexpr int rows(int quads) { return quads == 1 ? 12 : quads == 2 ? 8 : 6; }

    static EK_INLINE int8x16_t signed_codes(uint8x16_t v) {
        return vreinterpretq_s8_u8(kFlip ? veorq_u8(v, vdupq_n_u8(kFlip)) : v);
    }

    // Four bytes of each window times the weights of kQuads * 4 channels. Volatile, for the order: the compiler would move loads
    // ahead until sums no longer fit into registers.
    template <int kLane, int kRows, int kQuads>
    static EK_INLINE void step4(const int8_t*& w, int8x16_t (&a)[kRows], int32x4_t (&acc)[kRows][kQuads]) {
#pragma GCC unroll 2
        for (int q = 0; q + 1 < kQuads; q += 2) {
            int8x16_t one, two;
            asm volatile("ldp %q0, %q1, [%2], #32" : "=w"(one), "=w"(two), "+r"(w) : : "memory");
#pragma GCC unroll 12
            for (int r = 0; r < kRows; r++) dot_lane<kLane>(acc[r][q], one, a[r]);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; r++) dot_lane<kLane>(acc[r][q + 1 < kQuads ? q + 1 : 0], two, a[r]);
        }
        if (kQuads % 2) {
            int8x16_t one;
            asm volatile("ldr %q0, [%1], #16" : "=w"(one), "+r"(w) : : "memory");
#pragma GCC unroll 12
            for (int r = 0; r < kRows; r++) dot_lane<kLane>(acc[r][kQuads - 1], one, a[r]);
        }
    }

    template <int kRows, int kQuads>
    static EK_INLINE void sums(const int8_t* const* first, const Conv& conv, const int8_t* w, const int32_t* bias,
                               int32x4_t (&acc)[kRows][kQuads]) {
#pragma GCC unroll 12
        for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
            for (int q = 0; q + 1 < kQuads; q += 2)
                asm volatile("ldp %q0, %q1, [%2, %3]" : "=w"(acc[r][q]), "=w"(acc[r][q + 1 < kQuads ? q + 1 : 0]) : "r"(bias), "i"(16 * q) : "memory");
            if (kQuads % 2) asm volatile("ldr %q0, [%1, %2]" : "=w"(acc[r][kQuads - 1]) : "r"(bias), "i"(16 * (kQuads - 1)) : "memory");
        }
        int8x16_t a[kRows];
        const int8_t* p = first[0];
        ptrdiff_t from[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; r++) from[r] = first[r] - p;
        const int groups = conv.groups;
        const ptrdiff_t* jumps = conv.jumps;
        for (int segments = conv.segments;;) {
            int left = groups;
            for (; left >= 4; left -= 4) {
#pragma GCC unroll 12
                for (int r = 0; r < kRows; r++) asm volatile("ldr %q0, [%1, %2]" : "=w"(a[r]) : "r"(p), "r"(from[r]) : "memory");
                p += 16;
                step4<0>(w, a, acc);
                step4<1>(w, a, acc);
                step4<2>(w, a, acc);
                step4<3>(w, a, acc);
            }
            if (left) {
#pragma GCC unroll 12
                for (int r = 0; r < kRows; r++) asm volatile("ldr %q0, [%1, %2]" : "=w"(a[r]) : "r"(p), "r"(from[r]) : "memory");
                step4<0>(w, a, acc);
                if (left > 1) step4<1>(w, a, acc);
                if (left > 2) step4<2>(w, a, acc);
            }
            if (--segments == 0) break;
            p += *jumps++;
        }
    }

    static int read(int groups) { return groups / 4 * 16; }  // how far sums() goes in a segment

    // [group][block][segment][4 bytes of a window][output channel][byte]; sixes: bias before each block, an even number of fours
    static bool weights(const Step& step, Conv& conv, Store& store, int first) {
        if (conv.depthwise) return depthwise_weights(step, conv, store);
        conv.groups = (conv.segment_bytes + 3) / 4;
        if (conv.sixes) conv.groups += conv.groups & 1;
        const int per_group = step.out[0].c / step.group;
        const size_t quad = static_cast<size_t>(conv.segments) * conv.groups * 16 + (conv.sixes ? 16 : 0);
        conv.block_bytes = quad * 4;
        conv.group_bytes = quad * ((per_group + 3) / 4);
        int8_t* to = reinterpret_cast<int8_t*>(store.bytes(conv.group_bytes * step.group));
        conv.weights = to;
        const int8_t* rows = reinterpret_cast<const int8_t*>(step.constants[0]);
        const ptrdiff_t each = static_cast<ptrdiff_t>(conv.segments) * conv.segment_bytes;
        const int fours = conv.second ? 0 : conv.segment_bytes / 4;  // that lie side by side
        for (int group = 0; group < step.group; group++)
            for (int b = 0; b < conv.blocks; b++) {
                const int quads = (min(kLanes, per_group - b * kLanes) + 3) / 4;
                if (conv.sixes) std::memcpy(to, conv.bias + b * kLanes, static_cast<size_t>(16 * quads)), to += 16 * quads;
                for (int s = 0; s < conv.segments; s++)
                    for (int g = 0; g < conv.groups; g++)
                        for (int o = b * kLanes; o < b * kLanes + 4 * quads; o++, to += 4)
                            if (g < fours && o < per_group) std::memcpy(to, rows + (group * per_group + o) * each + s * conv.segment_bytes + 4 * g, 4);
                            else for (int k = 0; k < 4; k++)
                                to[k] = o < per_group ? weight_at(step, conv, group * per_group + o, s, 4 * g + k, first) : int8_t{0};
            }
        return true;
    }

    // --- depthwise: 4 taps of a channel side by side in 4 bytes ---

    // [16 channels][4 taps][channel][tap]
    static bool depthwise_weights(const Step& step, Conv& conv, Store& store) {
        const int8_t* all = reinterpret_cast<const int8_t*>(step.constants[0]);
        const int channels = step.in[0].c, taps = step.kernel[0] * step.kernel[1];
        const auto weight = [&](int c, int t) { return c < channels && t < taps ? all[c * taps + t] : int8_t{0}; };
        conv.groups = (taps + 3) / 4;
        conv.block_bytes = static_cast<size_t>(conv.groups) * 64;
        int8_t* to = reinterpret_cast<int8_t*>(store.bytes(conv.block_bytes * ((channels + 15) / 16)));
        conv.weights = to;
        for (int c = 0; c < channels; c += 16)
            for (int g = 0; g < conv.groups; g++)
                for (int i = 0; i < 16; i++)
                    for (int t = 0; t < 4; t++) *to++ = weight(c + i, 4 * g + t);
        return true;
    }

    // 16 channels of kPixels neighbours, `right` bytes apart: taps are woven by fours.
    template <int kPixels>
    static EK_INLINE void taps_of(const Conv& conv, const int8_t* p, ptrdiff_t right, const int8_t* w, const int32_t* bias,
                                  int32x4_t (&acc)[kPixels][4]) {
#pragma GCC unroll 2
        for (int x = 0; x < kPixels; x++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[x][i] = vld1q_s32(bias + 4 * i);
        const ptrdiff_t* at = conv.offsets;
        for (int left = conv.groups; left > 0; left--, at += 4, w += 64) {
            const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16), w2 = vld1q_s8(w + 32), w3 = vld1q_s8(w + 48);
            const ptrdiff_t t0 = at[0], t1 = at[1], t2 = at[2], t3 = at[3];
#pragma GCC unroll 2
            for (int x = 0; x < kPixels; x++) {
                const int8_t* from = p + x * right;
                const int8x16_t a = vld1q_s8(from + t0), b = vld1q_s8(from + t1), c = vld1q_s8(from + t2), d = vld1q_s8(from + t3);
                const int16x8_t ab = vreinterpretq_s16_s8(vzip1q_s8(a, b)), cd = vreinterpretq_s16_s8(vzip1q_s8(c, d));
                const int16x8_t ef = vreinterpretq_s16_s8(vzip2q_s8(a, b)), gh = vreinterpretq_s16_s8(vzip2q_s8(c, d));
                acc[x][0] = dot(acc[x][0], vreinterpretq_s8_s16(vzip1q_s16(ab, cd)), w0);
                acc[x][1] = dot(acc[x][1], vreinterpretq_s8_s16(vzip2q_s16(ab, cd)), w1);
                acc[x][2] = dot(acc[x][2], vreinterpretq_s8_s16(vzip1q_s16(ef, gh)), w2);
                acc[x][3] = dot(acc[x][3], vreinterpretq_s8_s16(vzip2q_s16(ef, gh)), w3);
            }
        }
    }

    template <Mode kMode>
    static void depthwise(const Step& step, const Conv& conv, const int8_t* in, int number, int rows, int valid, int16_t* raw,
                          uint8_t* codes, ptrdiff_t pitch) {
        const View& out = step.out[0];
        const int8_t* w = conv.weights + number * conv.block_bytes;
        const int32_t* bias = conv.bias + 16 * number;
        const Multipliers<kMode, 4> by(conv.multipliers + 16 * number, conv.factors + 16 * number, conv.zero);
        const ptrdiff_t right = step.stride[1] * conv.slice;
        const auto put = [&](const int32x4_t(&acc)[4]) __attribute__((always_inline)) { put_pixel<kMode>(by, acc, valid, raw, codes, pitch); };
        for (int y = 0; y < rows; y++) {
            const int8_t* p = in + static_cast<ptrdiff_t>(y) * step.stride[0] * conv.row_bytes;
            int x = out.w;
            for (; x >= 2; x -= 2, p += 2 * right) {
                int32x4_t acc[2][4];
                taps_of(conv, p, right, w, bias, acc);
                put(acc[0]), put(acc[1]);
            }
            if (x) {
                int32x4_t acc[1][4];
                taps_of(conv, p, right, w, bias, acc);
                put(acc[0]);
            }
        }
    }
};

bool prepare(Step& step, Store& store) {
    return step.type == OpType::kConv ? prepare_conv<Dots>(step, store) : prepare_other(step, store);
}

}  // namespace
}  // namespace edgekit
