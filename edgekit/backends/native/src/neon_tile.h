// Tiles of the aarch64 convolutions: what becomes of sums in registers, and blocks of channels made of tiles.
#pragma once

#include "neon_finish.h"

namespace edgekit {
namespace {

// Where a tile goes: 4 * kQuads channels of its pixels, `pitch` elements apart.
struct Target {
    const float* multipliers;
    const int32_t* factors;
    int valid;  // channels wanted
    int16_t* raw;
    uint8_t* codes;
    float* floats;
    ptrdiff_t pitch;
    const Step* step;
    const Conv* conv;
};

template <int kQuads> EK_INLINE void store_tile(uint8_t* p, ptrdiff_t pitch, uint8x16_t v) {
    if constexpr (kQuads == 4) vst1q_u8(p, v);
    if constexpr (kQuads == 3) {
        vst1_u8(p, vget_low_u8(v));
        vst1q_lane_u32(reinterpret_cast<uint32_t*>(p + 8), vreinterpretq_u32_u8(v), 2);
    }
    if constexpr (kQuads < 3) store_pixels<4 * kQuads>(p, pitch, v, 4 * kQuads, 16);
}

// All of a tile; kRows = 1 writes whole vectors whatever kQuads.
template <Mode kMode, int kRows, int kQuads> EK_INLINE void emit(int32x4_t (&acc)[kRows][kQuads], const Target& to) {
    const float* m = to.multipliers;
    if constexpr (kMode == Mode::kFloats) {
#pragma GCC unroll 12
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
            for (int q = 0; q < kQuads; q++)
                vst1q_f32(to.floats + r * to.pitch + 4 * q, vmulq_f32(vcvtq_f32_s32(acc[r][q]), vld1q_f32(m + 4 * q)));
    } else {
        constexpr int kWide = kQuads == 3 || kRows == 1 ? 16 : 4 * kQuads, kPixels = 16 / kWide, kVectors = kRows / kPixels;
        static_assert(kRows % kPixels == 0, "whole vectors");
        const Multipliers<kMode, kQuads> by(m, to.factors, to.conv->zero);
        int16x8_t low[kVectors], high[kVectors];
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; i++) {
            const auto sum = [&](int k) __attribute__((always_inline)) { return acc[i * kPixels + k * 4 / kWide][min(k % (kWide / 4), kQuads - 1)]; };
            const auto of = [](int k) { return min(k % (kWide / 4), kQuads - 1); };
            low[i] = by(sum(0), sum(1), of(0), of(1));
            high[i] = kWide == 16 && kQuads <= 2 ? low[i] : by(sum(2), sum(3), of(2), of(3));
        }
        if constexpr (kMode == Mode::kRaw) {
#pragma GCC unroll 12
            for (int i = 0; i < kVectors; i++) vst1q_s16(to.raw + 16 * i, low[i]), vst1q_s16(to.raw + 16 * i + 8, high[i]);
            return;
        }
        constexpr int kStored = kRows == 1 ? 4 : kQuads;
        uint8x16_t codes[kVectors];
        if constexpr (kMode == Mode::kCurve) {
            const Curve curve(*to.step, *to.conv);
            constexpr int kAtOnce = kVectors % 3 ? 1 : 3;
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i += kAtOnce) {
                curve.template operator()<kAtOnce>(low + i, high + i, codes + i);
#pragma GCC unroll 3
                for (int k = i; k < i + kAtOnce; k++) store_tile<kStored>(to.codes + k * kPixels * to.pitch, to.pitch, codes[k]);
            }
            return;
        }
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; i++) codes[i] = pack_codes(low[i], high[i]);
        if constexpr (kMode == Mode::kTable) look_up(to.conv->tables, codes);
#pragma GCC unroll 12
        for (int i = 0; i < kVectors; i++) store_tile<kStored>(to.codes + i * kPixels * to.pitch, to.pitch, codes[i]);
    }
}

// The windows of neighbouring output pixels in the packed input.
struct Windows {
    const int8_t* first;
    int width;        // pixels of a line
    int right, down;  // bytes from one to the next in a line, from a line to the next
};

__attribute__((noinline)) void copy_lines(uint8_t* to, ptrdiff_t pitch, const uint8_t* from, ptrdiff_t from_pitch, int bytes, int lines) {
    for (int i = 0; i < lines; i++, to += pitch, from += from_pitch) {
        const uint8_t* source = from;
        uint8_t* target = to;
        int left = bytes;
        for (; left > 16; left -= 16, source += 16, target += 16) vst1q_u8(target, vld1q_u8(source));
        copy_bytes(target, source, left);
    }
}

// `count` codes of 16 channels in a row, of which `valid` are there, through the table.
inline void look_up_block(const Conv& conv, uint8_t* found, int count, int valid, uint8_t* to, ptrdiff_t pitch) {
    look_up_all(conv.tables, found, count, valid == 16 ? to : found, valid == 16 ? pitch : 16);
    if (valid < 16) copy_lines(to, pitch, found, 16, valid, count);
}

// kRows pixels of which `count` are wanted, somewhere else first.
template <Mode kMode, int kRows, int kQuads> EK_INLINE void emit_part(int32x4_t (&acc)[kRows][kQuads], const Target& to, int count) {
    if constexpr (kMode == Mode::kRaw) return emit<kMode, kRows, kQuads>(acc, to);  // has room for all
    Target part = to;
    uint8_t codes[kRows * 16];
    float floats[kMode == Mode::kFloats ? kRows * 16 : 1];
    part.codes = codes, part.floats = floats, part.pitch = kRows == 1 ? 16 : 4 * kQuads;
    emit<kMode, kRows, kQuads>(acc, part);
    if constexpr (kMode == Mode::kFloats)
        copy_lines(reinterpret_cast<uint8_t*>(to.floats), 4 * to.pitch, reinterpret_cast<uint8_t*>(floats), 4 * part.pitch, 4 * to.valid,
                   min(kRows, count));
    else
        copy_lines(to.codes, to.pitch, codes, part.pitch, to.valid, min(kRows, count));
}

template <Mode kMode> EK_INLINE void advance(Target& to, int rows, int wide) {
    if constexpr (kMode == Mode::kRaw) to.raw += rows * wide;
    else if constexpr (kMode == Mode::kFloats) to.floats += rows * to.pitch;
    else to.codes += rows * to.pitch;
}

// A block of up to 16 output channels for `count` pixels.
template <typename Core, Mode kMode, int kQuads>
__attribute__((noinline)) void block(const Conv& conv, const int8_t* weights, const int32_t* bias, const Windows& windows, int count,
                                     Target to) {
    constexpr int kRows = Core::rows(kQuads), kWide = kQuads == 3 ? 16 : 4 * kQuads;
    const int8_t* first[kRows];
    const int8_t *line = windows.first, *next = line;
    const int right = windows.right;
    int x = windows.width;  // left in this line
    const bool whole = to.valid == 4 * kQuads;
    for (; count > 0; count -= kRows) {
        if (EK_LIKELY(count > kRows && x > kRows)) {
#pragma GCC unroll 12
            for (int i = 0; i < kRows; i++) first[i] = next, next += right;
            x -= kRows;
        } else {
            for (int i = 0; i < kRows; i++) {
                first[i] = next;
                if (i + 1 >= count) continue;  // the last one again
                next += right;
                if (--x == 0) x = windows.width, next = line += windows.down;
            }
            if (count == 1) {
                int32x4_t acc[1][kQuads];
                Core::template sums<1, kQuads>(first, conv, weights, bias, acc);
                return emit_part<kMode, 1, kQuads>(acc, to, 1);
            }
        }
        int32x4_t acc[kRows][kQuads];
        Core::template sums<kRows, kQuads>(first, conv, weights, bias, acc);
        if (EK_LIKELY(whole && count >= kRows)) emit<kMode, kRows, kQuads>(acc, to);
        else emit_part<kMode, kRows, kQuads>(acc, to, count);
        advance<kMode>(to, kRows, kWide);
    }
}

template <typename Core, Mode kMode>
void block_any(const Conv& conv, const int8_t* weights, const int32_t* bias, const Windows& windows, int count, const Target& to) {
    switch ((to.valid + 3) / 4) {
        case 1: return block<Core, kMode, 1>(conv, weights, bias, windows, count, to);
        case 2: return block<Core, kMode, 2>(conv, weights, bias, windows, count, to);
        case 3: return block<Core, kMode, 3>(conv, weights, bias, windows, count, to);
        default: return block<Core, kMode, 4>(conv, weights, bias, windows, count, to);
    }
}

// Where a block of channels goes, from pixel `at` on.
template <Mode kMode>
Target target(const Step& step, const Conv& conv, const Frame& frame, int group, int number, ptrdiff_t at, uint8_t* scratch) {
    const View& out = step.out[0];
    const int per_group = out.c / step.group, o = group * per_group + number * kLanes;
    Target to{};
    to.multipliers = conv.multipliers + (group * conv.blocks + number) * kLanes;
    to.factors = conv.factors + (group * conv.blocks + number) * kLanes;
    to.valid = min(kLanes, per_group - number * kLanes);
    to.raw = reinterpret_cast<int16_t*>(scratch + conv.raw_at);
    if (kMode == Mode::kFloats) to.floats = frame.floats(out) + at * out.pitch + o;
    else to.codes = frame.bytes(out) + at * out.pitch + o;
    to.pitch = out.pitch;
    if (conv.residual) to.codes = scratch + conv.codes_at, to.pitch = 16;
    to.step = &step;
    to.conv = &conv;
    return to;
}

// The passes over what a block left at `to`.
template <Mode kMode>
void finish_channels(const Step& step, const Conv& conv, const Frame& frame, int group, int number, ptrdiff_t at, int count, const Target& to) {
    if (kMode == Mode::kFloats && step.act != Act::kNone) activate<Vec128>(activation(step), to.floats, to.pitch, to.floats, to.pitch, count, to.valid);
    if (kMode == Mode::kRaw) {
        const int wide = to.valid > 8 ? 16 : to.valid > 4 ? 8 : 4;
        const Finish f{to.raw, wide, count, to.valid, to.codes, to.pitch};
        if (wide == 16) finish_any<16>(step, conv, f);
        else if (wide == 8) finish_any<8>(step, conv, f);
        else finish_any<4>(step, conv, f);
    }
    if (conv.residual) add_residual(step, frame, at, group * (step.out[0].c / step.group) + number * kLanes, to.valid, to.codes, count);
}

template <typename Core, Mode kMode>
void channels(const Step& step, const Conv& conv, const Frame& frame, int group, int number, ptrdiff_t at, int count,
              uint8_t* scratch, const Windows& windows) {
    const Target to = target<kMode>(step, conv, frame, group, number, at, scratch);
    const int8_t* weights = conv.weights + group * conv.group_bytes + number * conv.block_bytes;
    block_any<Core, kMode>(conv, weights, conv.bias + (group * conv.blocks + number) * kLanes, windows, count, to);
    finish_channels<kMode>(step, conv, frame, group, number, at, count, to);
}

// Units of a pointwise convolution: a chunk of pixels is packed once (pack(input, at, count, channel): where an input's channels
// begin) for all blocks of channels that are computed of it (block(number, at, count)).
template <typename Pack, typename Block>
EK_INLINE void by_chunks(const Step& step, const Conv& conv, int begin, int end, Pack pack, Block block) {
    const int pixels = step.out[0].pixels();
    int have = -1;
    for (int unit = begin; unit < end; unit++) {
        const int chunk = unit / conv.splits, split = unit % conv.splits;
        const int at = chunk * conv.chunk, count = min(conv.chunk, pixels - at);
        if (chunk != have) {
            pack(step.in[0], at, count, 0);
            if (conv.second) pack(step.in[2], at, count, conv.second);
            have = chunk;
        }
        const int first = conv.blocks * split / conv.splits, last = conv.blocks * (split + 1) / conv.splits;
        for (int number = first; number < last; number++) block(number, at, count);
    }
}

}  // namespace
}  // namespace edgekit
