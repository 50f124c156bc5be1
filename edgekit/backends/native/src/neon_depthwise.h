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
    const int32_t* factors;
    int zero;
    int pad, left, width_in, width;  // code of the pad, columns of it before a line; pixels of a line
    ptrdiff_t pitch;                 // of codes
    const Row* rows;                 // of the first line's window, and on
    int channel, lines;
};

EK_INLINE int8x16_t flipped(uint8x16_t v) { return vreinterpretq_s8_u8(kFlip ? veorq_u8(v, vdupq_n_u8(kFlip)) : v); }

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

#define EK_COLUMN(l, h)                                                                                                        \
    "ld1 {v24.8b}, [%[p0]], %[s0]\n ld1 {v25.8b}, [%[p1]], %[s1]\n ld1 {v26.8b}, [%[p2]], %[s2]\n ld1 {v27.8b}, [%[p3]], %[s3]\n"   \
    "zip1 v24.16b, v24.16b, v25.16b\n zip1 v26.16b, v26.16b, v27.16b\n"                                                         \
    EK_FLIPS("eor v24.16b, v24.16b, v23.16b\n eor v26.16b, v26.16b, v23.16b\n")                                                 \
    "zip1 v" #l ".8h, v24.8h, v26.8h\n zip2 v" #h ".8h, v24.8h, v26.8h\n"
#define EK_TAP(sum, codes, weights) EK_DOTS " v" #sum ".4s, v" #codes ".16b, v" #weights ".16b\n"
#define EK_LOWER(al, ah, bl, bh, cl, ch) \
    "ldp q6, q7, [%[bias]]\n" EK_TAP(6, al, 14) EK_TAP(7, ah, 15) EK_TAP(6, bl, 16) EK_TAP(7, bh, 17) EK_TAP(6, cl, 18) EK_TAP(7, ch, 19)
#define EK_UPPER(al, ah, bl, bh, cl, ch) \
    "ldp q6, q7, [%[bias]]\n" EK_TAP(6, al, 8) EK_TAP(7, ah, 9) EK_TAP(6, bl, 10) EK_TAP(7, bh, 11) EK_TAP(6, cl, 12) EK_TAP(7, ch, 13)
#define EK_AS_CODES(to)                                                                                                        \
    "sqrdmulh v6.4s, v6.4s, v20.4s\n sqrdmulh v7.4s, v7.4s, v21.4s\n uzp1 v6.8h, v6.8h, v7.8h\n"                                \
    "add v6.8h, v6.8h, v22.8h\n sqxtun v6.8b, v6.8h\n st1 {v6.8b}, [%[" #to "]], %[pitch]\n"
#define EK_AS_RAW(to)                                                                                                          \
    "scvtf v6.4s, v6.4s\n scvtf v7.4s, v7.4s\n fmul v6.4s, v6.4s, v20.4s\n fmul v7.4s, v7.4s, v21.4s\n fcvtns v6.4s, v6.4s\n"    \
    "fcvtns v7.4s, v7.4s\n sqxtn v6.4h, v6.4s\n sqxtn2 v6.8h, v7.4s\n st1 {v6.8h}, [%[" #to "]], %[pitch]\n"
#define EK_NEXT(end, al, ah, bl, bh, cl, ch) EK_COLUMN(cl, ch) EK_LOWER(al, ah, bl, bh, cl, ch) end(lower) EK_UPPER(al, ah, bl, bh, cl, ch) end(upper)
#define EK_COLUMNS(end)                                                                                                        \
    "ld1 {v8.16b-v11.16b}, [%[w]], #64\n ld1 {v12.16b-v15.16b}, [%[w]], #64\n ld1 {v16.16b-v19.16b}, [%[w]]\n"                  \
    "ldp q20, q21, [%[m]]\n dup v22.8h, %w[zero]\n movi v23.16b, %[flip]\n ld1 {v0.16b-v3.16b}, [%[last]]\n"                  \
    "1:\n" EK_NEXT(end, 0, 1, 2, 3, 4, 5) EK_NEXT(end, 2, 3, 4, 5, 0, 1) EK_NEXT(end, 4, 5, 0, 1, 2, 3)                        \
    "subs %w[count], %w[count], #1\n b.ne 1b\n st1 {v0.16b-v3.16b}, [%[last]]\n"

// Four rows at once, and the two lines that they make.
struct Walk {
    const uint8_t *p0, *p1, *p2, *p3;
    ptrdiff_t s0, s1, s2, s3;
    uint8_t *upper, *lower;
};

// Three times `count` columns behind the last two. In one piece: the compiler would keep in memory what
// these registers hold.
template <Mode kMode> EK_INLINE void columns(const Three& t, Walk& walk, Column (&last)[2], int count, ptrdiff_t pitch) {
    const int8_t* w = t.weights;
    const void* m = kMode == Mode::kRaw ? static_cast<const void*>(t.multipliers) : t.factors;
#define EK_WALKING                                                                                                              \
    : [p0] "+r"(walk.p0), [p1] "+r"(walk.p1), [p2] "+r"(walk.p2), [p3] "+r"(walk.p3), [upper] "+r"(walk.upper),                     \
      [lower] "+r"(walk.lower), [w] "+r"(w), [count] "+r"(count)                                                                \
    : [last] "r"(last), [s0] "r"(walk.s0), [s1] "r"(walk.s1), [s2] "r"(walk.s2), [s3] "r"(walk.s3), [bias] "r"(t.bias), [m] "r"(m),  \
      [pitch] "r"(pitch), [zero] "r"(t.zero), [flip] "i"(kFlip)                                                                \
    : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", \
      "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "cc", "memory"
    if constexpr (kMode == Mode::kRaw) asm volatile(EK_COLUMNS(EK_AS_RAW) EK_WALKING);
    else asm volatile(EK_COLUMNS(EK_AS_CODES) EK_WALKING);
}

// Stride 1, two lines at a time. The upper one is written after the lower one: it may be the same.
template <Mode kMode> __attribute__((noinline)) void line_pairs(const Three& t, Line to) {
    const Multipliers<kMode, 2> m(t.multipliers, t.factors, t.zero);
    const ptrdiff_t pitch = kMode == Mode::kRaw ? 32 : t.pitch;
    const ptrdiff_t channel = t.channel;
    uint8_t* first = kMode == Mode::kRaw ? reinterpret_cast<uint8_t*>(to.raw) : to.codes;
    const Row* row = t.rows;
    Walk walk;
    const auto take = [](const uint8_t*& p, ptrdiff_t step) __attribute__((always_inline)) {
        const uint8x16_t v = vcombine_u8(vld1_u8(p), vdup_n_u8(0));
        p += step;
        return v;
    };
    int at;  // the next column
    const int end = t.width_in;
    const auto next = [&]() __attribute__((always_inline)) {
        if (at++ < 0 || at > end) {
            const int8x16_t pad = vdupq_n_s8(static_cast<int8_t>(t.pad));
            return Column{pad, pad};
        }
        const uint8x16_t v0 = take(walk.p0, walk.s0), v1 = take(walk.p1, walk.s1), v2 = take(walk.p2, walk.s2), v3 = take(walk.p3, walk.s3);
        const int16x8_t ab = vreinterpretq_s16_s8(flipped(vzip1q_u8(v0, v1))), cd = vreinterpretq_s16_s8(flipped(vzip1q_u8(v2, v3)));
        return Column{vreinterpretq_s8_s16(vzip1q_s16(ab, cd)), vreinterpretq_s8_s16(vzip2q_s16(ab, cd))};
    };
    const auto put = [&](const Column& a, const Column& b, const Column& c, const int8_t* w, uint8_t*& to) __attribute__((always_inline)) {
        int32x4_t low = vld1q_s32(t.bias), high = vld1q_s32(t.bias + 4);
        low = dot(low, a.low, vld1q_s8(w)), low = dot(low, b.low, vld1q_s8(w + 32)), low = dot(low, c.low, vld1q_s8(w + 64));
        high = dot(high, a.high, vld1q_s8(w + 16)), high = dot(high, b.high, vld1q_s8(w + 48)), high = dot(high, c.high, vld1q_s8(w + 80));
        const int16x8_t r = m(low, high, 0, 1);
        if constexpr (kMode == Mode::kRaw) vst1q_s16(reinterpret_cast<int16_t*>(to), r);
        else vst1_u8(to, vqmovun_s16(r));
        to += pitch;
    };
    for (int left = t.lines; left > 0; left -= 2, row += 2) {
        walk.upper = walk.lower = first;
        if (left > 1) walk.lower += pitch * t.width;
        first += 2 * pitch * t.width;
        walk.p0 = row[0].at + channel, walk.p1 = row[1].at + channel, walk.p2 = row[2].at + channel, walk.p3 = row[3].at + channel;
        walk.s0 = row[0].step, walk.s1 = row[1].step, walk.s2 = row[2].step, walk.s3 = row[3].step;
        at = -t.left;
        Column last[2] = {next(), next()};
        int x = t.width;
        if (const int thirds = at < 0 ? 0 : min(x, end - at) / 3; thirds > 0) {
            columns<kMode>(t, walk, last, thirds, pitch);
            x -= 3 * thirds, at += 3 * thirds;
        }
        for (; x > 0; x--) {
            const Column c = next();
            put(last[0], last[1], c, t.weights + 96, walk.lower);
            put(last[0], last[1], c, t.weights, walk.upper);
            last[0] = last[1], last[1] = c;
        }
    }
}

// Stride 2, 16 channels.
template <Mode kMode> __attribute__((noinline)) void single_lines(const Three& t, Line to) {
    EK_TWELVE(t.weights);
    const Multipliers<kMode, 4> m(t.multipliers, t.factors, t.zero);
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
        const int16x8_t low = m(s0, s1, 0, 1), high = m(s2, s3, 2, 3);
        if constexpr (kMode == Mode::kRaw) {
            vst1q_s16(to.raw, low), vst1q_s16(to.raw + 8, high);
            to.raw += 16;
        } else {
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
    const int wide = step.stride[0] == 1 ? 8 : 16;
    for (int half = 0; half < 16 && channel + half < out.c; half += wide, to.raw += wide, to.codes += wide) {
        const int first = channel + half;
        const Three t{conv.weights + channel / 16 * conv.block_bytes + half / 8 * 192, conv.bias + first, conv.multipliers + first, conv.factors + first,
                      conv.zero, in.zero ^ kFlip, step.pad[1], in.w, out.w, pitch, rows, first, lines};
        if (wide == 8) line_pairs<kMode>(t, to);
        else single_lines<kMode>(t, to);
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
            if (kMode == Mode::kTable) look_up_block(conv, found, count, valid, codes, out.pitch);
            else copy_lines(codes, out.pitch, found, 16, valid, count);
        }
    }
}

}  // namespace
}  // namespace edgekit
