// Second passes of the aarch64 convolutions: activations of sums that lie in scratch as int16, and residuals.
#pragma once

#include "neon_conv.h"

namespace edgekit {
namespace {

// Where finish() reads and writes: `count` pixels of `lanes` int16 each, of which `valid` are channels.
struct Finish {
    const int16_t* raw;
    ptrdiff_t raw_pitch;  // int16 between pixels
    int count, valid;
    uint8_t* out;
    ptrdiff_t out_pitch;
};

#ifdef EK_RDM  // multiplies, rounds and adds at once
#define EK_LINE(base, slope, at) "sqrdmlah " base ".8h, " slope ".8h, " at ".8h\n"
#else
#define EK_LINE(base, slope, at) "sqrdmulh " slope ".8h, " slope ".8h, " at ".8h\n sqadd " base ".8h, " base ".8h, " slope ".8h\n"
#endif
// 16 results on the curve's grid, u; their codes replace the first half.
#define EK_BEND(low, high)                                                                                                       \
    "uzp2 %[i].16b, " low ".16b, " high ".16b\n ushr %[i].16b, %[i].16b, #1\n shl " low ".8h, " low ".8h, #6\n shl " high ".8h, " high  \
    ".8h, #6\n tbl %[p].16b, {v16.16b-v19.16b}, %[i].16b\n tbl %[q].16b, {v20.16b-v23.16b}, %[i].16b\n"                               \
    "zip1 %[b].16b, %[p].16b, %[q].16b\n zip2 %[p].16b, %[p].16b, %[q].16b\n"                                                         \
    "tbl %[q].16b, {v24.16b-v27.16b}, %[i].16b\n tbl %[i].16b, {v28.16b-v31.16b}, %[i].16b\n"                                         \
    "zip1 %[s].16b, %[q].16b, %[i].16b\n zip2 %[q].16b, %[q].16b, %[i].16b\n"                                                         \
    EK_LINE("%[b]", "%[s]", low) EK_LINE("%[p]", "%[q]", high)                                                                   \
    "sqrshrun " low ".8b, %[b].8h, #6\n sqrshrun2 " low ".16b, %[p].8h, #6\n"
#define EK_BENT(...)                                                                                                         \
    : __VA_ARGS__, [i] "=&w"(i), [p] "=&w"(p), [q] "=&w"(q), [b] "=&w"(b), [s] "=&w"(s), [at] "+r"(at) : : EK_TABLE_REGISTERS

// Results through the curve, 1 or 3 vectors at once. u << 6 leaves a bit of the segment's number on top of the part
// of it: odd ones are slope * 2^15 too small, which their base makes good (prepare_tables).
struct Curve {
    const uint8_t* planes;
    int16x8_t offset;
    Curve(const Step& step, const Conv& conv) : planes(conv.tables), offset(vdupq_n_s16(static_cast<int16_t>(step.ints[0]))) {}

    template <int kCount> EK_INLINE void operator()(const int16x8_t* low, const int16x8_t* high, uint8x16_t* codes) const {
        static_assert(kCount == 1 || kCount == 3, "one of those below");
        const uint8_t* at = planes;
        int16x8_t i, p, q, b, s, low0 = grid(low[0]), high0 = grid(high[0]);
        if constexpr (kCount == 1) {
            asm volatile(EK_LOAD_TABLE("%[at]") EK_BEND("%[l0]", "%[h0]") EK_BENT([l0] "+w"(low0), [h0] "+w"(high0)));
        } else {
            int16x8_t low1 = grid(low[1]), high1 = grid(high[1]), low2 = grid(low[2]), high2 = grid(high[2]);
            asm volatile(EK_LOAD_TABLE("%[at]") EK_BEND("%[l0]", "%[h0]") EK_BEND("%[l1]", "%[h1]") EK_BEND("%[l2]", "%[h2]")
                         EK_BENT([l0] "+w"(low0), [h0] "+w"(high0), [l1] "+w"(low1), [h1] "+w"(high1), [l2] "+w"(low2), [h2] "+w"(high2)));
            codes[1] = vreinterpretq_u8_s16(low1), codes[2] = vreinterpretq_u8_s16(low2);
        }
        codes[0] = vreinterpretq_u8_s16(low0);
    }

  private:
    EK_INLINE int16x8_t grid(int16x8_t r) const { return vmaxq_s16(vqaddq_s16(r, offset), vdupq_n_s16(0)); }
};

__attribute__((noinline, cold)) void store_part(uint8_t* p, ptrdiff_t pitch, uint8x16_t v, int wide, int valid, int count) {
    uint8_t bytes[16];
    vst1q_u8(bytes, v);
    for (int i = 0; i < 16 / wide && i < count; i++) copy_bytes(p + i * pitch, bytes + i * wide, valid);
}

// Stores the first `valid` lanes of the first `count` pixels that lie in v, kWide lanes each.
template <int kWide> EK_INLINE void store_pixels(uint8_t* p, ptrdiff_t pitch, uint8x16_t v, int valid, int count) {
    constexpr int kPixels = 16 / kWide;
    if (EK_LIKELY(valid == kWide && count >= kPixels)) {
        if constexpr (kWide == 16) vst1q_u8(p, v);
        if constexpr (kWide == 8) vst1_u8(p, vget_low_u8(v)), vst1_u8(p + pitch, vget_high_u8(v));
        if constexpr (kWide == 4) {
            const uint32x4_t w = vreinterpretq_u32_u8(v);
            vst1q_lane_u32(reinterpret_cast<uint32_t*>(p), w, 0);
            vst1q_lane_u32(reinterpret_cast<uint32_t*>(p + pitch), w, 1);
            vst1q_lane_u32(reinterpret_cast<uint32_t*>(p + 2 * pitch), w, 2);
            vst1q_lane_u32(reinterpret_cast<uint32_t*>(p + 3 * pitch), w, 3);
        }
        return;
    }
    store_part(p, pitch, v, kWide, valid, count);
}

// 16 channels of a pixel, as int16 or as codes of which `valid` are wanted; moves on to the next one.
template <Mode kMode>
EK_INLINE void put_pixel(const Multipliers<kMode, 4>& by, const int32x4_t (&acc)[4], int valid, int16_t*& raw, uint8_t*& codes, ptrdiff_t pitch) {
    const int16x8_t low = by(acc[0], acc[1], 0, 1), high = by(acc[2], acc[3], 2, 3);
    if constexpr (kMode == Mode::kRaw) vst1q_s16(raw, low), vst1q_s16(raw + 8, high), raw += 16;
    else store_pixels<16>(codes, 0, pack_codes(low, high), valid, 1), codes += pitch;
}

template <Act kAct, int kWide> void finish(const Step& step, const Conv& conv, const Finish& f) {
    constexpr int kPixels = 16 / kWide, kAtOnce = kAct == Act::kTable ? 4 : 3;
    const int16x8_t zero = vdupq_n_s16(static_cast<int16_t>(conv.zero));
    const Curve curve(step, conv);
    const uint8_t* table = conv.tables;
    const ptrdiff_t raw_pitch = kPixels * f.raw_pitch, out_pitch = f.out_pitch;
    const int16_t* raw = f.raw;
    uint8_t* out = f.out;
    const bool whole = f.valid == kWide;
    for (int count = f.count; count > 0; count -= kAtOnce * kPixels) {
        uint8x16_t q[kAtOnce];
        int16x8_t low[kAtOnce], high[kAtOnce];
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; i++, raw += raw_pitch) low[i] = vld1q_s16(raw), high[i] = vld1q_s16(raw + 8);
        if constexpr (kAct == Act::kCurve) {
            curve.template operator()<3>(low, high, q);
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; i++) q[i] = codes_of(low[i], high[i], zero);
            if constexpr (kAct == Act::kTable) look_up(table, q);
        }
        if (EK_LIKELY(whole && count >= kAtOnce * kPixels)) {
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; i++, out += kPixels * out_pitch) store_pixels<kWide>(out, out_pitch, q[i], kWide, kPixels);
        } else {
            for (int i = 0; i < kAtOnce; i++, out += kPixels * out_pitch)
                if (i * kPixels < count) store_part(out, out_pitch, q[i], kWide, f.valid, count - i * kPixels);
        }
    }
}

template <int kWide> void finish_any(const Step& step, const Conv& conv, const Finish& f) {
    if (step.act == Act::kTable) return finish<Act::kTable, kWide>(step, conv, f);
    if (step.act == Act::kCurve) return finish<Act::kCurve, kWide>(step, conv, f);
    finish<Act::kNone, kWide>(step, conv, f);
}

// --- residuals ---

template <typename Sum>
void add_pixels(const Sum& given, const uint8_t* codes, const uint8_t* more, ptrdiff_t more_pitch, uint8_t* to, ptrdiff_t pitch, int count,
                int valid, const uint8_t* table) {
    const Sum sum = given;
    if (valid == 16 && !table)
        for (; count >= 4; count -= 4, codes += 64)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, more += more_pitch, to += pitch) vst1q_u8(to, sum(vld1q_u8(codes + 16 * i), vld1q_u8(more)));
    for (; count > 0; count--, codes += 16, more += more_pitch, to += pitch) {
        uint8x16_t q = sum(vld1q_u8(codes), vld1q_u8(more));
        if (table) q = look_up(table, q);
        store_some(to, q, valid);
    }
}

// Adds the residual to codes of `count` pixels, 16 bytes each: those of `valid` channels of the output from `channel` on.
inline void add_residual(const Step& step, const Frame& frame, ptrdiff_t at, int channel, int valid, const uint8_t* codes, int count) {
    const View &more = step.in[1], &out = step.out[0];
    with_sum(step.ints[1], more.zero, step.scalars[0], step.scalars[1], out.zero, [&](const auto& sum) {
        add_pixels(sum, codes, frame.bytes(more) + at * more.pitch + channel, more.pitch, frame.bytes(out) + at * out.pitch + channel,
                   out.pitch, count, valid, step.constants[4]);
    });
}

// The second passes over 16 channels in `raw`, of which `valid` are there.
inline void finish_depthwise(const Step& step, const Conv& conv, const Frame& frame, int16_t* raw, ptrdiff_t at, int count, int channel,
                             int valid) {
    const View& out = step.out[0];
    uint8_t* codes = reinterpret_cast<uint8_t*>(raw);  // where a residual follows: what is written has been read
    if (!conv.residual) return finish_any<16>(step, conv, {raw, 16, count, valid, frame.bytes(out) + at * out.pitch + channel, out.pitch});
    finish_any<16>(step, conv, {raw, 16, count, valid, codes, 16});
    add_residual(step, frame, at, channel, valid, codes, count);
}

}  // namespace
}  // namespace edgekit
