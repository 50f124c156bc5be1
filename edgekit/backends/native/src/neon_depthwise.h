// Depthwise 3x3 at stride 1 and 2 by dot products, from the picture as it lies. Included by neon_dots.h.
//
// Three or four rows of a column are woven so that a channel's bytes lie side by side: a dot product sums them. At stride 1 two
// lines share a column of four rows, for 8 channels; at stride 2 one line of 16 channels has three. Rows and columns of
// the pad are read from a constant. Codes whose activation is a table go to scratch first: a table takes half of the registers.
#pragma once

#include "neon_tile.h"

namespace edgekit {
namespace {

// A row of the picture, or of the pad, whose pixels are all the same: step 0.
struct Row {
    const uint8_t* at;
    ptrdiff_t step;  // to the next pixel
};

// Where a line goes: int16 for finish(), or codes.
struct Line {
    int16_t* raw;
    uint8_t* codes;
};

// All that lines() needs of a block of channels.
struct Three {
    const int8_t* weights;
    const int32_t* bias;
    const float* multipliers;
    float magic;
    int pad, left, width_in, width;  // code of the pad, columns of it before a line; pixels of a line
    ptrdiff_t pitch;                 // of codes
    const Row* rows;                 // of the first line's window, and on
    int channel, lines;
};

EK_INLINE int8x16_t flipped(uint8x16_t v) { return vreinterpretq_s8_u8(kFlip ? veorq_u8(v, vdupq_n_u8(kFlip)) : v); }

EK_INLINE void put_half(uint8_t*& to, ptrdiff_t pitch, uint8x8_t v) { asm volatile("st1 {%1.8b}, [%0], %2" : "+r"(to) : "w"(v), "r"(pitch) : "memory"); }

EK_INLINE void load_pair(const int32_t* from, int32x4_t& low, int32x4_t& high) {  // the compiler would copy registers
    asm volatile("ldp %q0, %q1, [%2]" : "=w"(low), "=w"(high) : "r"(from) : "memory");
}

// Twelve vectors in a row, by name: an array would be kept in memory.
#define EK_TWELVE(at)                                                                                                            \
    const int8x16_t w0 = vld1q_s8(at), w1 = vld1q_s8(at + 16), w2 = vld1q_s8(at + 32), w3 = vld1q_s8(at + 48), w4 = vld1q_s8(at + 64),  \
                    w5 = vld1q_s8(at + 80), w6 = vld1q_s8(at + 96), w7 = vld1q_s8(at + 112), w8 = vld1q_s8(at + 128),                  \
                    w9 = vld1q_s8(at + 144), w10 = vld1q_s8(at + 160), w11 = vld1q_s8(at + 176)

// 8 channels of a column: four rows of each.
struct Column {
    int8x16_t low, high;
};

// Stride 1, two lines at a time. The upper one is written after the lower one: it may be the same.
template <Mode kMode, bool kOdd> __attribute__((noinline)) void line_pairs(const Three& t, Line to) {
    EK_TWELVE(t.weights);
    const float32x4_t m_low = vld1q_f32(t.multipliers), m_high = vld1q_f32(t.multipliers + 4), magic = vdupq_n_f32(t.magic);
    const int32_t* bias = t.bias;
    const ptrdiff_t pitch = t.pitch;
    const ptrdiff_t channel = t.channel;
    const Row* row = t.rows;
    Line upper, lower;
    const auto finish = [&](int32x4_t low, int32x4_t high, Line& to) __attribute__((always_inline)) {
        if constexpr (kMode == Mode::kRaw) {
            vst1q_s16(to.raw, narrow(rounded(low, m_low), rounded(high, m_high)));
            to.raw += 16;
        } else {
            int16x8_t r = bounded(low, high, m_low, m_high, magic);
            if (kOdd) r = vaddq_s16(r, vdupq_n_s16(1));
            put_half(to.codes, pitch, vqmovun_s16(r));
        }
    };
    const auto put = [&](const Column& a, const Column& b, const Column& c) __attribute__((always_inline)) {
        int32x4_t low, high;
        load_pair(bias, low, high);
        low = dot(low, a.low, w6), low = dot(low, b.low, w8), low = dot(low, c.low, w10);
        high = dot(high, a.high, w7), high = dot(high, b.high, w9), high = dot(high, c.high, w11);
        finish(low, high, lower);
        load_pair(bias, low, high);
        low = dot(low, a.low, w0), low = dot(low, b.low, w2), low = dot(low, c.low, w4);
        high = dot(high, a.high, w1), high = dot(high, b.high, w3), high = dot(high, c.high, w5);
        finish(low, high, upper);
    };
    const uint8_t *p0, *p1, *p2, *p3;
    ptrdiff_t s0, s1, s2, s3;
    const auto take = [](const uint8_t*& p, ptrdiff_t step) __attribute__((always_inline)) {
        uint8x16_t v;
        asm volatile("ld1 {%0.8b}, [%1], %2" : "=w"(v), "+r"(p) : "r"(step) : "memory");
        return v;
    };
    const auto inside = [&]() __attribute__((always_inline)) {
        const uint8x16_t v0 = take(p0, s0), v1 = take(p1, s1), v2 = take(p2, s2), v3 = take(p3, s3);
        const int16x8_t ab = vreinterpretq_s16_s8(flipped(vzip1q_u8(v0, v1))), cd = vreinterpretq_s16_s8(flipped(vzip1q_u8(v2, v3)));
        return Column{vreinterpretq_s8_s16(vzip1q_s16(ab, cd)), vreinterpretq_s8_s16(vzip2q_s16(ab, cd))};
    };
    int at;  // the next column
    const int end = t.width_in;
    const auto any = [&]() __attribute__((always_inline)) {
        const int8x16_t pad = vdupq_n_s8(static_cast<int8_t>(t.pad));
        const bool in = at >= 0 && at < end;
        at++;
        return in ? inside() : Column{pad, pad};
    };
    for (int left = t.lines; left > 0; left -= 2, row += 2) {
        upper = lower = to;
        if (left > 1) lower.raw += 16 * t.width, lower.codes += pitch * t.width;
        to.raw += 32 * t.width, to.codes += 2 * pitch * t.width;
        p0 = row[0].at + channel, p1 = row[1].at + channel, p2 = row[2].at + channel, p3 = row[3].at + channel;
        s0 = row[0].step, s1 = row[1].step, s2 = row[2].step, s3 = row[3].step;
        at = -t.left;
        Column a = any(), b = any(), c;
        int x = t.width;
        if (at >= 0)
            for (; x >= 3 && at + 3 <= end; x -= 3, at += 3) {
                c = inside(), put(a, b, c);
                a = inside(), put(b, c, a);
                b = inside(), put(c, a, b);
            }
        for (; x > 0; x--) c = any(), put(a, b, c), a = b, b = c;
    }
}

// Stride 2, 16 channels.
template <Mode kMode, bool kOdd> __attribute__((noinline)) void single_lines(const Three& t, Line to) {
    EK_TWELVE(t.weights);
    const float* m = t.multipliers;
    const float32x4_t m0 = vld1q_f32(m), m1 = vld1q_f32(m + 4), m2 = vld1q_f32(m + 8), m3 = vld1q_f32(m + 12);
    const float32x4_t magic = vdupq_n_f32(t.magic);
    const int32_t* bias = t.bias;
    const ptrdiff_t pitch = t.pitch;
    const uint8_t *p0, *p1, *p2;
    ptrdiff_t by0, by1, by2;
    const auto take = [](const uint8_t*& p, ptrdiff_t step) __attribute__((always_inline)) {
        uint8x16_t v;
        asm volatile("ld1 {%0.16b}, [%1], %2" : "=w"(v), "+r"(p) : "r"(step) : "memory");
        return flipped(v);
    };
    struct Woven {
        int8x16_t v[4];
    };
    const auto inside = [&]() __attribute__((always_inline)) {
        const int8x16_t v0 = take(p0, by0), v1 = take(p1, by1), v2 = take(p2, by2);
        const int16x8_t a = vreinterpretq_s16_s8(vzip1q_s8(v0, v1)), b = vreinterpretq_s16_s8(vzip2q_s8(v0, v1));
        const int16x8_t c = vreinterpretq_s16_s8(vzip1q_s8(v2, v2)), d = vreinterpretq_s16_s8(vzip2q_s8(v2, v2));  // the fourth has weight 0
        return Woven{{vreinterpretq_s8_s16(vzip1q_s16(a, c)), vreinterpretq_s8_s16(vzip2q_s16(a, c)), vreinterpretq_s8_s16(vzip1q_s16(b, d)),
                      vreinterpretq_s8_s16(vzip2q_s16(b, d))}};
    };
    int at;
    const int end = t.width_in;
    const auto any = [&]() __attribute__((always_inline)) {
        const int8x16_t pad = vdupq_n_s8(static_cast<int8_t>(t.pad));
        const bool in = at >= 0 && at < end;
        at++;
        return in ? inside() : Woven{{pad, pad, pad, pad}};
    };
    const auto pixel = [&](Woven& a, const auto& next) __attribute__((always_inline)) {
        int32x4_t s0, s1, s2, s3;
        load_pair(bias, s0, s1), load_pair(bias + 8, s2, s3);
        s0 = dot(s0, a.v[0], w0), s1 = dot(s1, a.v[1], w1), s2 = dot(s2, a.v[2], w2), s3 = dot(s3, a.v[3], w3);
        a = next();
        s0 = dot(s0, a.v[0], w4), s1 = dot(s1, a.v[1], w5), s2 = dot(s2, a.v[2], w6), s3 = dot(s3, a.v[3], w7);
        a = next();
        s0 = dot(s0, a.v[0], w8), s1 = dot(s1, a.v[1], w9), s2 = dot(s2, a.v[2], w10), s3 = dot(s3, a.v[3], w11);
        if constexpr (kMode == Mode::kRaw) {
            vst1q_s16(to.raw, narrow(rounded(s0, m0), rounded(s1, m1)));
            vst1q_s16(to.raw + 8, narrow(rounded(s2, m2), rounded(s3, m3)));
            to.raw += 16;
        } else {
            int16x8_t low = bounded(s0, s1, m0, m1, magic), high = bounded(s2, s3, m2, m3, magic);
            if (kOdd) low = vaddq_s16(low, vdupq_n_s16(1)), high = vaddq_s16(high, vdupq_n_s16(1));
            asm volatile("st1 {%1.16b}, [%0], %2" : "+r"(to.codes) : "w"(pack_codes(low, high)), "r"(pitch) : "memory");
        }
    };
    const ptrdiff_t channel = t.channel;
    const Row* row = t.rows;
    for (int left = t.lines; left > 0; left--, row += 2) {
        p0 = row[0].at + channel, p1 = row[1].at + channel, p2 = row[2].at + channel;
        by0 = row[0].step, by1 = row[1].step, by2 = row[2].step;
        at = -t.left;
        Woven a = any();
        int x = t.width;
        if (at >= 0)
            for (; x > 0 && at + 2 <= end; x--, at += 2) pixel(a, inside);
        for (; x > 0; x--) pixel(a, any);
    }
}

inline bool is_three(const Step& step) {
    return step.kernel[0] == 3 && step.kernel[1] == 3 && step.dilation[0] == 1 && step.dilation[1] == 1 &&
           step.stride[0] == step.stride[1] && step.stride[0] <= 2;
}

// Stride 1: [8 channels][row of the pair][column][channel][4 rows]; stride 2: [16 channels][column][channel][4 rows]
inline void three_weights(const Step& step, Conv& conv, Store& store) {
    const int8_t* all = reinterpret_cast<const int8_t*>(step.constants[0]);
    const int channels = step.in[0].c, lines = step.stride[0] == 1 ? 2 : 1, wide = 16 / lines;
    conv.block_bytes = static_cast<size_t>(lines * 192);
    int8_t* to = reinterpret_cast<int8_t*>(store.bytes(conv.block_bytes * ((channels + 15) / 16)));
    conv.weights = to;
    for (int c = 0; c < (channels + 15) / 16 * 16; c += wide)
        for (int lower = 0; lower < lines; lower++)
            for (int x = 0; x < 3; x++)
                for (int i = c; i < c + wide; i++)
                    for (int y = -lower; y < 4 - lower; y++) *to++ = i < channels && y >= 0 && y < 3 ? all[i * 9 + y * 3 + x] : int8_t{0};
}

// How units are cut, and what they need.
inline void prepare_three(Step& step, Conv& conv, Store& store) {
    const View& out = step.out[0];
    three_weights(step, conv, store);
    const size_t pads = static_cast<size_t>(step.in[0].c) + 15;
    std::memset(conv.pads = store.bytes(pads), step.in[0].zero, pads);
    conv.chunk = max(2, kScratchBytes / 2 / (16 * out.w) & ~1);
    const int pieces = out.n * ((out.h + conv.chunk - 1) / conv.chunk);
    conv.slices = pieces >= 8 ? 1 : min(4, (out.c + 15) / 16);
    step.units = pieces * conv.slices;
    conv.rows_in = (conv.chunk - 1) * step.stride[0] + 4;
    conv.raw_at = (sizeof(Row) * conv.rows_in + 63) / 64 * 64;
    step.scratch = conv.raw_at + (static_cast<size_t>(conv.chunk) * out.w + 16) * kLanes * sizeof(int16_t);
}

// The rows that windows of a picture's lines from `line` on reach.
inline void find_rows(const Step& step, const Conv& conv, const uint8_t* picture, int line, Row* rows) {
    const View& in = step.in[0];
    int y = line * step.stride[0] - step.pad[0];
    for (int i = 0; i < conv.rows_in; i++, y++)
        rows[i] = y >= 0 && y < in.h ? Row{picture + static_cast<ptrdiff_t>(y) * in.w * in.pitch, in.pitch} : Row{conv.pads, 0};
}

// `lines` lines of the 16 channels from `channel` on.
template <Mode kMode> void three_block(const Step& step, const Conv& conv, const Row* rows, int lines, int channel, Line to, ptrdiff_t pitch) {
    const View &in = step.in[0], &out = step.out[0];
    const bool odd = kMode == Mode::kCodes && conv.odd;
    const int wide = step.stride[0] == 1 ? 8 : 16;
    for (int half = 0; half < 16 && channel + half < out.c; half += wide, to.raw += wide, to.codes += wide) {
        const int first = channel + half;
        const Three t{conv.weights + channel / 16 * conv.block_bytes + half / 8 * 192, conv.bias + first, conv.multipliers + first, conv.magic,
                      in.zero ^ kFlip, step.pad[1], in.w, out.w, pitch, rows, first, lines};
        if (wide == 8) (odd ? line_pairs<kMode, true> : line_pairs<kMode, false>)(t, to);
        else (odd ? single_lines<kMode, true> : single_lines<kMode, false>)(t, to);
    }
}

// kMode: kCodes, kTable or kRaw.
template <Mode kMode> void run_three(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    constexpr Mode kLines = kMode == Mode::kRaw ? Mode::kRaw : Mode::kCodes;
    const Conv& conv = *static_cast<const Conv*>(step.prepared);
    const View& out = step.out[0];
    const int per_picture = (out.h + conv.chunk - 1) / conv.chunk, blocks = (out.c + 15) / 16;
    for (int unit = begin; unit < end; unit++) {
        const int slice = unit % conv.slices, piece = unit / conv.slices;
        const int i = piece / per_picture, y = piece % per_picture * conv.chunk, rows = min(conv.chunk, out.h - y), count = rows * out.w;
        const ptrdiff_t at = (static_cast<ptrdiff_t>(i) * out.h + y) * out.w;
        Row* from = reinterpret_cast<Row*>(scratch);
        find_rows(step, conv, frame.bytes(step.in[0]) + static_cast<ptrdiff_t>(i) * step.in[0].h * step.in[0].w * step.in[0].pitch, y, from);
        uint8_t* found = scratch + conv.raw_at;
        for (int block = blocks * slice / conv.slices; block < blocks * (slice + 1) / conv.slices; block++) {
            const int channel = 16 * block, valid = min(16, out.c - channel);
            uint8_t* codes = frame.bytes(out) + at * out.pitch + channel;
            const Line there{reinterpret_cast<int16_t*>(found), found};
            if (kMode == Mode::kCodes && valid == 16) {
                three_block<kLines>(step, conv, from, rows, channel, Line{there.raw, codes}, out.pitch);
                continue;
            }
            three_block<kLines>(step, conv, from, rows, channel, there, 16);
            if constexpr (kMode == Mode::kRaw) {
                finish_depthwise(step, conv, frame, there.raw, at, count, channel, valid);
                continue;
            }
            if (kMode == Mode::kTable) look_up_all(conv.tables, found, count, valid == 16 ? codes : found, valid == 16 ? out.pitch : 16);
            if (valid < 16) copy_lines(codes, out.pitch, found, 16, valid, count);
        }
    }
}

}  // namespace
}  // namespace edgekit
