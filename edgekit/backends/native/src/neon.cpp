// aarch64 without dot product instructions (Cortex-A53, A72): bytes are multiplied to int16, and pairs of products added there,
// which int32 sums then take. |code - 128| <= 128, so two products fit unless both weights are -128.
#if defined(__aarch64__)
#include <cstring>
#include <new>

#include "kernels.h"

#pragma GCC optimize("O3")
#include <arm_neon.h>

#include "neon_ops.h"
#include "neon_prepare.h"

namespace edgekit {
namespace {

struct Products {
    static constexpr int kFlip = 0x80;
    static constexpr bool kSixes = false;
    template <Mode> static constexpr Run sixes() { return nullptr; }
    static bool three(const Step&) { return false; }
    static void prepare_three(Step&, Conv&, Store&) {}
    template <Mode> static constexpr Run three() { return nullptr; }
    static constexpr int rows(int) { return 4; }
    static constexpr int kFits = 255;  // sum of |weights| that int16 takes at 128 each

    static EK_INLINE int8x16_t signed_codes(uint8x16_t v) { return vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(kFlip))); }

    // 16 bytes of four windows times those of one output channel. In one piece: the compiler would begin all products of a
    // step first, and keep sums in memory.
    static EK_INLINE void four_rows(const int8x16_t (&a)[4], int8x16_t w, int32x4_t& s0, int32x4_t& s1, int32x4_t& s2, int32x4_t& s3) {
        int16x8_t t0, t1, t2, t3;
        asm volatile("smull %4.8h, %8.8b, %12.8b\n smull %5.8h, %9.8b, %12.8b\n smull %6.8h, %10.8b, %12.8b\n smull %7.8h, %11.8b, %12.8b\n"
                     "smlal2 %4.8h, %8.16b, %12.16b\n smlal2 %5.8h, %9.16b, %12.16b\n smlal2 %6.8h, %10.16b, %12.16b\n"
                     "smlal2 %7.8h, %11.16b, %12.16b\n"
                     "sadalp %0.4s, %4.8h\n sadalp %1.4s, %5.8h\n sadalp %2.4s, %6.8h\n sadalp %3.4s, %7.8h\n"
                     : "+w"(s0), "+w"(s1), "+w"(s2), "+w"(s3), "=&w"(t0), "=&w"(t1), "=&w"(t2), "=&w"(t3)
                     : "w"(a[0]), "w"(a[1]), "w"(a[2]), "w"(a[3]), "w"(w));
    }

    // A sum per output channel as four parts, along the window.
    template <int kRows, bool kFit>
    static EK_INLINE void parts(const int8_t* const* first, const Conv& conv, const int8_t*& w, int32x4_t (&acc)[kRows][4]) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
            for (int o = 0; o < 4; o++) acc[r][o] = vdupq_n_s32(0);
        const int8_t* p[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) p[r] = first[r];
        for (int s = 0;;) {
            int left = conv.groups;
            for (; left >= 2; left -= 2) {
                int8x16_t a[kRows];
#pragma GCC unroll 4
                for (int r = 0; r < kRows; r++) a[r] = vld1q_s8(p[r]), p[r] += 16;
#pragma GCC unroll 4
                for (int o = 0; o < 4; o++, w += 16) {
                    const int8x16_t weights = vld1q_s8(w);
                    if constexpr (kRows == 4 && kFit) {
                        four_rows(a, weights, acc[0][o], acc[1][o], acc[2][o], acc[3][o]);
                        continue;
                    }
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; r++) {
                        int16x8_t t = vmull_s8(vget_low_s8(a[r]), vget_low_s8(weights));
                        if (kFit) {
                            t = vmlal_high_s8(t, a[r], weights);
                        } else {
                            acc[r][o] = vpadalq_s16(acc[r][o], t);
                            t = vmull_high_s8(a[r], weights);
                        }
                        acc[r][o] = vpadalq_s16(acc[r][o], t);
                    }
                }
            }
            for (; left; left--)
#pragma GCC unroll 4
                for (int o = 0; o < 4; o++, w += 8)
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; r++) acc[r][o] = vpadalq_s16(acc[r][o], vmull_s8(vld1_s8(p[r]), vld1_s8(w)));
            if (s + 1 == conv.segments) break;
            const ptrdiff_t jump = conv.jumps[s++];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) p[r] += jump;
        }
    }

    static int read(int groups) { return groups / 2 * 16; }  // how far sums() goes in a segment

    template <int kRows, int kQuads>
    static EK_INLINE void sums(const int8_t* const* first, const Conv& conv, const int8_t* w, const int32_t* bias,
                               int32x4_t (&acc)[kRows][kQuads]) {
#pragma GCC unroll 1
        for (int q = 0; q < kQuads; q++) {
            int32x4_t part[kRows][4];
            if (conv.sums_fit) parts<kRows, true>(first, conv, w, part);
            else parts<kRows, false>(first, conv, w, part);
            const int32x4_t b = vld1q_s32(bias + 4 * q);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++)
                acc[r][q] = vaddq_s32(b, vpaddq_s32(vpaddq_s32(part[r][0], part[r][1]), vpaddq_s32(part[r][2], part[r][3])));
        }
    }

    // [group][block][4 output channels][segment][16 bytes of a window, at the end 8][output channel][byte]
    static bool weights(const Step& step, Conv& conv, Store& store, int first) {
        if (conv.depthwise) return depthwise_weights(step, conv, store);
        for (size_t i = 0; i < step.constant_bytes[0]; i++) conv.sums_fit &= static_cast<int8_t>(step.constants[0][i]) != -128;
        conv.groups = (conv.segment_bytes + 7) / 8;
        const int per_group = step.out[0].c / step.group;
        const size_t quad = static_cast<size_t>(conv.segments) * conv.groups * 32;
        conv.block_bytes = quad * 4;
        conv.group_bytes = quad * ((per_group + 3) / 4);
        int8_t* to = reinterpret_cast<int8_t*>(store.bytes(conv.group_bytes * step.group));
        conv.weights = to;
        for (int group = 0; group < step.group; group++)
            for (int q = 0; q < per_group; q += 4)
                for (int s = 0; s < conv.segments; s++)
                    for (int k = 0; k < conv.groups * 8; k += 16) {
                        const int wide = min(16, conv.groups * 8 - k);
                        for (int o = q; o < q + 4; o++)
                            for (int i = 0; i < wide; i++)
                                *to++ = o < per_group ? weight_at(step, conv, group * per_group + o, s, k + i, first) : int8_t{0};
                    }
        return true;
    }

    // --- depthwise: taps are added in int16 as long as they fit ---

    // [16 channels]: number of taps that fit together, run by run (as bytes, up to 128 taps), then [tap][channel]
    static constexpr int kRuns = 128;

    static bool depthwise_weights(const Step& step, Conv& conv, Store& store) {
        const int8_t* all = reinterpret_cast<const int8_t*>(step.constants[0]);
        const int channels = step.in[0].c, taps = step.kernel[0] * step.kernel[1];
        if (taps > kRuns) return false;
        conv.block_bytes = static_cast<size_t>(kRuns) + static_cast<size_t>(taps) * 16;
        int8_t* to = reinterpret_cast<int8_t*>(store.bytes(conv.block_bytes * ((channels + 15) / 16)));
        conv.weights = to;
        for (int c = 0; c < channels; c += 16, to += conv.block_bytes) {
            int run = -1, room[16] = {};
            for (int t = 0; t < taps; t++) {
                bool fits = run >= 0;
                for (int i = 0; i < 16; i++) {
                    const int w = c + i < channels ? all[(c + i) * taps + t] : 0;
                    to[kRuns + t * 16 + i] = static_cast<int8_t>(w);
                    room[i] -= w < 0 ? -w : w;
                    fits &= room[i] >= 0;
                }
                if (!fits) {
                    run++;
                    for (int i = 0; i < 16; i++) {
                        const int w = to[kRuns + t * 16 + i];
                        room[i] = kFits - (w < 0 ? -w : w);
                    }
                }
                to[run]++;
            }
        }
        return true;
    }

    template <int kPixels>
    static EK_INLINE void taps_of(const Conv& conv, const int8_t* p, int right, const int8_t* w, int taps, const int32_t* bias,
                                  int32x4_t (&acc)[kPixels][4]) {
        for (int x = 0; x < kPixels; x++)
            for (int i = 0; i < 4; i++) acc[x][i] = vld1q_s32(bias + 4 * i);
        const int8_t *run = w, *v = w + kRuns, *end = v + 16 * taps;
        const ptrdiff_t* offset = conv.offsets;
        while (v < end) {
            int16x8_t low[kPixels], high[kPixels];
            int8x16_t weights = vld1q_s8(v);
#pragma GCC unroll 4
            for (int x = 0; x < kPixels; x++) {
                const int8x16_t a = vld1q_s8(p + *offset + x * right);
                low[x] = vmull_s8(vget_low_s8(a), vget_low_s8(weights)), high[x] = vmull_high_s8(a, weights);
            }
            v += 16, offset++;
            for (int left = *run++ - 1; left > 0; left--, v += 16, offset++) {
                weights = vld1q_s8(v);
#pragma GCC unroll 4
                for (int x = 0; x < kPixels; x++) {
                    const int8x16_t a = vld1q_s8(p + *offset + x * right);
                    low[x] = vmlal_s8(low[x], vget_low_s8(a), vget_low_s8(weights)), high[x] = vmlal_high_s8(high[x], a, weights);
                }
            }
#pragma GCC unroll 4
            for (int x = 0; x < kPixels; x++) {
                acc[x][0] = vaddw_s16(acc[x][0], vget_low_s16(low[x])), acc[x][1] = vaddw_high_s16(acc[x][1], low[x]);
                acc[x][2] = vaddw_s16(acc[x][2], vget_low_s16(high[x])), acc[x][3] = vaddw_high_s16(acc[x][3], high[x]);
            }
        }
    }

    template <Mode kMode>
    static void depthwise(const Step& step, const Conv& conv, const int8_t* in, int number, int rows, int valid, int16_t* raw,
                          uint8_t* codes, ptrdiff_t pitch) {
        constexpr int kPixels = 3;
        const View& out = step.out[0];
        const int8_t* w = conv.weights + number * conv.block_bytes;
        const int32_t* bias = conv.bias + 16 * number;
        const Multipliers<kMode, 4> by(conv.multipliers + 16 * number, conv.factors + 16 * number, conv.zero);
        const int taps = step.kernel[0] * step.kernel[1], right = step.stride[1] * conv.slice;
        const auto put = [&](const int32x4_t(&acc)[4]) __attribute__((always_inline)) { put_pixel<kMode>(by, acc, valid, raw, codes, pitch); };
        for (int y = 0; y < rows; y++) {
            const int8_t* p = in + static_cast<ptrdiff_t>(y) * step.stride[0] * conv.row_bytes;
            int x = 0;
            for (; x + kPixels <= out.w; x += kPixels, p += kPixels * right) {
                int32x4_t acc[kPixels][4];
                taps_of(conv, p, right, w, taps, bias, acc);
                for (int i = 0; i < kPixels; i++) put(acc[i]);
            }
            for (; x < out.w; x++, p += right) {
                int32x4_t acc[1][4];
                taps_of(conv, p, right, w, taps, bias, acc);
                put(acc[0]);
            }
        }
    }
};

bool here() { return true; }

bool prepare(Step& step, Store& store) {
    return step.type == OpType::kConv ? prepare_conv<Products>(step, store) : prepare_other(step, store);
}

}  // namespace

const Isa kNeon = {"neon", here, prepare};

}  // namespace edgekit
#endif
