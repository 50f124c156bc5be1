// Running the aarch64 convolutions: copying what a unit reads into scratch, block by block through the tiles.
#pragma once

#include "neon_tile.h"

namespace edgekit {
namespace {

// --- pointwise: pixels in a row, whatever picture or line they are of ---

// Copies at least `bytes`, up to 15 too many.
template <typename Core> EK_INLINE void pack_run(const uint8_t* from, int8_t* to, int bytes) {
    for (; bytes > 48; bytes -= 64, from += 64, to += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16) vst1q_s8(to + i, Core::signed_codes(vld1q_u8(from + i)));
    for (; bytes > 0; bytes -= 16, from += 16, to += 16) vst1q_s8(to, Core::signed_codes(vld1q_u8(from)));
}

template <typename Core, int kSteps>
EK_INLINE void pack_few(const uint8_t* from, ptrdiff_t from_pitch, int8_t* to, ptrdiff_t pitch, int count) {
    for (; count > 0; count--, from += from_pitch, to += pitch)
#pragma GCC unroll 4
        for (int i = 0; i < kSteps; i++) vst1q_s8(to + 16 * i, Core::signed_codes(vld1q_u8(from + 16 * i)));
}

// Copies `count` pixels of c bytes, up to 15 too many of each, in order.
template <typename Core>
void pack_pixels(const uint8_t* from, ptrdiff_t from_pitch, int8_t* to, ptrdiff_t pitch, int c, int count) {
    if (from_pitch == pitch && pitch - c < 16) return pack_run<Core>(from, to, static_cast<int>((count - 1) * pitch) + c);
    switch ((c + 15) / 16) {
        case 1: return pack_few<Core, 1>(from, from_pitch, to, pitch, count);
        case 2: return pack_few<Core, 2>(from, from_pitch, to, pitch, count);
        case 3: return pack_few<Core, 3>(from, from_pitch, to, pitch, count);
        case 4: return pack_few<Core, 4>(from, from_pitch, to, pitch, count);
    }
    for (; count > 0; count--, from += from_pitch, to += pitch) pack_run<Core>(from, to, c);
}

// `count` pixels from number `at` on, by the convolution's stride.
template <typename Core>
void pack_chunk(const Step& step, const View& in, const uint8_t* from, int at, int count, int8_t* into, int depth) {
    const View& out = step.out[0];
    if (step.stride[0] == 1 && step.stride[1] == 1)
        return pack_pixels<Core>(from + at * in.pitch, in.pitch, into, depth, in.c, count);
    for (int end = at + count; at < end;) {  // line by line
        const int x = at % out.w, line = at / out.w, here = min(out.w - x, end - at);
        const ptrdiff_t row = static_cast<ptrdiff_t>(line / out.h) * in.h + line % out.h * step.stride[0];
        pack_pixels<Core>(from + (row * in.w + x * step.stride[1]) * in.pitch, step.stride[1] * in.pitch, into, depth, in.c, here);
        at += here, into += here * depth;
    }
}

template <typename Core, Mode kMode>
void run_pointwise(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& conv = *static_cast<const Conv*>(step.prepared);
    int8_t* packed = reinterpret_cast<int8_t*>(scratch);
    const auto pack = [&](const View& in, int at, int count, int channel) {
        pack_chunk<Core>(step, in, frame.bytes(in), at, count, packed + channel, conv.depth);
    };
    by_chunks(step, conv, begin, end, pack, [&](int number, int at, int count) {
        channels<Core, kMode>(step, conv, frame, 0, number, at, count, scratch, {packed, count, conv.depth, 0});
    });
}

// --- windows: dense, grouped and depthwise ---

// Copies channels [channel, channel + c) of input rows [row, row + rows) of picture i, padded at all sides, into `into`:
// pixels `pixel` bytes apart, rows conv.row_bytes. The source is read and the copy written up to 15 bytes too far.
template <typename Core>
void pack_rows(const Step& step, const Conv& conv, const Frame& frame, int i, int row, int rows, int channel, int c, int pixel,
               int8_t* into) {
    const View& in = step.in[0];
    const int8_t pad = static_cast<int8_t>(in.zero ^ Core::kFlip);
    const int left = step.pad[1];
    for (int r = 0; r < rows; r++, into += conv.row_bytes) {
        const int y = row + r;
        if (y < 0 || y >= in.h) {
            fill_bytes(into, pad, conv.row_bytes);
            continue;
        }
        const uint8_t* source = frame.bytes(in) + (static_cast<ptrdiff_t>(i) * in.h + y) * in.w * in.pitch + channel;
        int8_t* to = into + left * pixel;
        pack_pixels<Core>(source, in.pitch, to, pixel, c, in.w);
        fill_bytes(into, pad, left * pixel);
        fill_bytes(to + in.w * pixel, pad, conv.row_bytes - (left + in.w) * pixel);
    }
}

template <typename Core, Mode kMode>
void run_dense(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& conv = *static_cast<const Conv*>(step.prepared);
    const View &in = step.in[0], &out = step.out[0];
    int8_t* packed = reinterpret_cast<int8_t*>(scratch);
    const int per_picture = (out.h + conv.chunk - 1) / conv.chunk;
    for (int unit = begin; unit < end; unit++) {
        const int i = unit / per_picture, y = unit % per_picture * conv.chunk, rows = min(conv.chunk, out.h - y);
        const int span = (rows - 1) * step.stride[0] + (step.kernel[0] - 1) * step.dilation[0] + 1;
        pack_rows<Core>(step, conv, frame, i, y * step.stride[0] - step.pad[0], span, 0, in.c, in.c, packed);
        const int down = conv.row_bytes * step.stride[0], right = in.c * step.stride[1], width = out.w;
        for (int group = 0; group < step.group; group++) {
            const Windows windows{packed + group * (in.c / step.group), width, right, down};
            for (int number = 0; number < conv.blocks; number++)
                channels<Core, kMode>(step, conv, frame, group, number, (static_cast<ptrdiff_t>(i) * out.h + y) * out.w,
                                      rows * out.w, scratch, windows);
        }
    }
}

template <typename Core, Mode kMode>
void run_depthwise(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& conv = *static_cast<const Conv*>(step.prepared);
    const View& out = step.out[0];
    int8_t* packed = reinterpret_cast<int8_t*>(scratch);
    int16_t* raw = reinterpret_cast<int16_t*>(scratch + conv.raw_at);
    const int per_picture = (out.h + conv.chunk - 1) / conv.chunk;
    for (int unit = begin; unit < end; unit++) {
        const int part = unit % conv.slices, piece = unit / conv.slices;
        const int i = piece / per_picture, y = piece % per_picture * conv.chunk, rows = min(conv.chunk, out.h - y);
        const int channel = part * conv.slice, c = min(conv.slice, out.c - channel);
        const int span = (rows - 1) * step.stride[0] + (step.kernel[0] - 1) * step.dilation[0] + 1;
        pack_rows<Core>(step, conv, frame, i, y * step.stride[0] - step.pad[0], span, channel, c, conv.slice, packed);
        const ptrdiff_t at = (static_cast<ptrdiff_t>(i) * out.h + y) * out.w;
        uint8_t *codes = frame.bytes(out) + at * out.pitch + channel, *found = reinterpret_cast<uint8_t*>(raw);
        for (int b = 0; b < c; b += 16, codes += 16) {
            const int valid = min(16, c - b), number = (channel + b) / 16, count = rows * out.w;
            if constexpr (kMode == Mode::kTable) {
                Core::template depthwise<kMode>(step, conv, packed + b, number, rows, 16, raw, found, 16);
                look_up_block(conv, found, count, valid, codes, out.pitch);
            } else {
                Core::template depthwise<kMode>(step, conv, packed + b, number, rows, valid, raw, codes, out.pitch);
                if (kMode == Mode::kRaw) finish_depthwise(step, conv, frame, raw, at, count, channel + b, valid);
            }
        }
    }
}

}  // namespace
}  // namespace edgekit
