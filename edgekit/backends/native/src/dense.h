// Dense, grouped and pointwise convolutions of codes for any x86 set V: weights packed for tiles, work cut into units.
#pragma once

#include <cstring>

#include "tile.h"

namespace edgekit {
namespace {

struct Conv {
    Finish finish;
    int blocks = 0;
    const Block* block = nullptr;
    int chunk = 0;     // pixels of a unit, of flat ones
    int chunks = 0;
    int rows = 0;      // output rows of a band, of the others
    int bands = 0;     // of a picture; a unit is a band x block
    int band_rows = 0, band_columns = 0;  // what is copied of one
    ptrdiff_t band_pitch = 0;             // bytes of a copied row
};

// How the sums of a block of a convolution with windows are formed; `whole`: a window's rows lie side by side.
template <class V> Way way_of(const Step& s, const Block& b, bool whole) {
    const int bytes = s.kernel[1] * s.in[0].c, groups = b.run[0].groups;
    const bool codes = s.out[0].dtype == Dtype::kU8;
    if (V::kRegisters == 32 && b.width == 2 && 2 * b.count <= 3 * V::kLanes && codes) return Way::kHalf;
    if (V::kRegisters < 32 || b.width != 1 || !whole || s.out[0].w < 4) return Way::kAny;  // single pixels have no neighbours
    if (codes && s.kernel[1] == 3 && s.stride[1] == 1 && s.in[0].c % 4 == 0) return Way::kRow3;
    if (s.stride[1] * s.in[0].c != kStemStep || bytes + kStemShift > 4 * groups) return Way::kAny;
    return groups == 3 ? Way::kStem3 : groups == 5 ? Way::kStem5 : Way::kAny;
}

// Where output o of a block is summed. Packing takes 4 sums of each vector in turn: four vectors of codes come out in order if
// that is how outputs are dealt to them, see tile().
template <class V> int lane_of(const Step& s, const Block& b, int o) {
    if (b.width < 4 || s.out[0].dtype != Dtype::kU8) return o;
    return o / 4 % 4 * V::kLanes + o / 16 * 4 + o % 4;
}

// Weights of one run of a block in the order in which sum() reads them, `shift` bytes later.
template <class V> void pack_run(const Step& s, const Block& b, const Run& run, int channels, int shift, uint8_t* to) {
    const int8_t* weights = reinterpret_cast<const int8_t*>(s.constants[0]);
    const int in = channels / s.group, out = s.out[0].c / s.group;
    constexpr int each = 4 / V::kUnit;
    for (int o = 0; o < b.count; ++o) {
        const int base = (b.first + o) / out * in, lane = lane_of<V>(s, b, o);  // base: its group's first channel
        const ptrdiff_t at = static_cast<ptrdiff_t>(b.first + o) * s.kernel[0] + run.row;
        for (int column = 0; column < run.columns; ++column) {
            const int8_t* w = weights + (at * s.kernel[1] + run.column + column) * in;
            for (int i = most(0, base - run.channel); i < least(run.channels, base + in - run.channel); ++i) {
                const int e = column * run.channels + i + shift;
                const ptrdiff_t place = (static_cast<ptrdiff_t>(e / each) * b.width * V::kLanes + lane) * each + e % each;
                const int8_t value = w[run.channel + i - base];
                if (V::kUnit == 1) reinterpret_cast<int8_t*>(to)[place] = value;
                else reinterpret_cast<int16_t*>(to)[place] = value;
                const ptrdiff_t twin = place + V::kLanes / 2 * each;  // the same output of the other pixel
                if (b.way == Way::kHalf && o >= V::kLanes) reinterpret_cast<int8_t*>(to)[twin] = value;
            }
        }
    }
}

template <class V> void pack_weights(const Step& s, const Block& b, int channels, uint8_t* to) {
    for (int r = 0; r < b.runs; ++r) {
        for (int shift : {0, kStemShift}) {
            if (shift && b.way != Way::kStem3 && b.way != Way::kStem5) continue;
            pack_run<V>(s, b, b.run[r], channels, shift, to);
            to += static_cast<ptrdiff_t>(b.run[r].groups) * b.width * V::kBytes;
        }
    }
}

// Pixels of one row of the input as V multiplies them. Writes up to a vector more, where what comes next is still to be copied.
template <class V> EK_INLINE void copy_pixels(uint8_t* to, ptrdiff_t to_step, const uint8_t* from, ptrdiff_t pitch, int pixels, int channels) {
    const bool whole = pitch == channels && to_step == channels * V::kUnit;  // the row is in one piece
    const ptrdiff_t count = whole ? static_cast<ptrdiff_t>(pixels) * channels : channels;
    if (whole) pixels = pixels > 0;
    for (int x = 0; x < pixels; ++x, to += to_step, from += pitch) {
        if (V::kUnit == 2) V::widen(to, from, count);
        else for (ptrdiff_t k = 0; k < count; k += V::kBytes) V::store(to + k, V::load(from + k));
    }
}

template <class V> EK_INLINE void fill_codes(uint8_t* to, int code, ptrdiff_t count) {
    if (V::kUnit == 1) {
        std::memset(to, code, static_cast<size_t>(count));
    } else {
        for (ptrdiff_t i = 0; i < count; ++i) reinterpret_cast<int16_t*>(to)[i] = static_cast<int16_t>(code);
    }
}

inline Line line_at(const Step& s, const Frame& frame, const Block& b, ptrdiff_t pixel) {
    Line l = {};
    const int size = s.out[0].dtype == Dtype::kF32 ? 4 : 1;
    l.out_step = s.out[0].pitch * size;
    l.out = frame.buffers[s.out[0].buffer] + (s.out[0].offset + b.first) * size + pixel * l.out_step;
    if (s.in[1].c) {
        l.residual_step = s.in[1].pitch;
        l.residual = frame.bytes(s.in[1]) + b.first + pixel * l.residual_step;
    }
    return l;
}

// Pointwise: unit = chunk of pixels (all pictures in a row) x block of outputs.
template <class V> void run_flat(const Step& s, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& c = *static_cast<const Conv*>(s.prepared);
    const int pixels = s.out[0].pixels();
    const int channels = s.in[0].c + s.in[2].c;
    int packed = -1;
    for (int unit = begin; unit < end; ++unit) {
        const int chunk = unit / c.blocks;
        const Block& b = c.block[unit % c.blocks];
        const ptrdiff_t first = static_cast<ptrdiff_t>(chunk) * c.chunk;
        Line l = line_at(s, frame, b, first);
        l.pixels = least(c.chunk, static_cast<int>(pixels - first));
        if (V::kUnit == 1) {
            l.in[0] = frame.bytes(s.in[0]) + first * s.in[0].pitch;
            l.in_step[0] = s.in[0].pitch;
            if (s.ints[2]) {
                l.in[1] = frame.bytes(s.in[2]) + first * s.in[2].pitch;
                l.in_step[1] = s.in[2].pitch;
            }
        } else {
            l.in[0] = scratch;
            l.in_step[0] = static_cast<ptrdiff_t>(channels) * V::kUnit;
            if (chunk != packed) {
                for (int i = 0; i < 3; i += 2) {
                    const View& v = s.in[i];
                    if (!v.c) continue;
                    uint8_t* to = scratch + (i ? s.in[0].c * V::kUnit : 0);
                    copy_pixels<V>(to, l.in_step[0], frame.bytes(v) + first * v.pitch, v.pitch, l.pixels, v.c);
                }
                packed = chunk;
            }
        }
        b.line(c.finish, b, l);
    }
}

// The rows that a band of outputs sees, with pads, as V multiplies them.
template <class V> void copy_band(const Step& s, const uint8_t* from, int top, int rows, uint8_t* to) {
    const Conv& c = *static_cast<const Conv*>(s.prepared);
    const View& in = s.in[0];
    const ptrdiff_t pixel = static_cast<ptrdiff_t>(in.c) * V::kUnit;
    const int need = (rows - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1;
    const int left = least(s.pad[1], c.band_columns), middle = least(in.w, c.band_columns - left);
    const int right = c.band_columns - left - middle;
    for (int r = 0; r < need; ++r, to += c.band_pitch) {
        const int y = top * s.stride[0] - s.pad[0] + r;
        if (y < 0 || y >= in.h) {
            fill_codes<V>(to, in.zero, static_cast<ptrdiff_t>(c.band_columns) * in.c);
            continue;
        }
        fill_codes<V>(to, in.zero, static_cast<ptrdiff_t>(left) * in.c);
        copy_pixels<V>(to + left * pixel, pixel, from + static_cast<ptrdiff_t>(y) * in.w * in.pitch, in.pitch, middle, in.c);
        fill_codes<V>(to + (left + middle) * pixel, in.zero, static_cast<ptrdiff_t>(right) * in.c);
    }
}

// Windows: unit = band of output rows x block of outputs, from a copy of the rows that the band sees.
template <class V> void run_bands(const Step& s, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Conv& c = *static_cast<const Conv*>(s.prepared);
    const View &in = s.in[0], &out = s.out[0];
    const bool direct = V::kUnit == 1 && s.kernel[0] == 1 && s.kernel[1] == 1;  // no pads, no copy
    int copied = -1;
    for (int unit = begin; unit < end; ++unit) {
        const int band = unit / c.blocks, picture = band / c.bands, top = band % c.bands * c.rows;
        const int rows = least(c.rows, out.h - top);
        const Block& b = c.block[unit % c.blocks];
        const uint8_t* from = frame.bytes(in) + static_cast<ptrdiff_t>(picture) * in.h * in.w * in.pitch;
        if (!direct && band != copied) copy_band<V>(s, from, top, rows, scratch);
        copied = band;
        Line l = line_at(s, frame, b, (static_cast<ptrdiff_t>(picture) * out.h + top) * out.w);
        l.in[0] = direct ? from + static_cast<ptrdiff_t>(top) * s.stride[0] * in.w * in.pitch : scratch;
        l.in_step[0] = s.stride[1] * (direct ? in.pitch : static_cast<ptrdiff_t>(in.c) * V::kUnit);
        l.pixels = out.w;
        for (int r = 0; r < rows; ++r) {
            b.line(c.finish, b, l);
            l.in[0] += s.stride[0] * (direct ? in.w * in.pitch : c.band_pitch);
            l.out += out.w * l.out_step;
            l.residual += out.w * l.residual_step;
            l.before += over(out.w, V::template kPixels<V::kWidest>);
        }
    }
}

// Pixels of a unit: all units alike, whole tiles of 7, and enough units for two threads to share.
inline int chunk_of(int pixels, int blocks) {
    int chunk = 196;
    while (chunk > 49 && over(pixels, chunk) * blocks < 8) chunk /= 2;
    return least(pixels, up(over(pixels, over(pixels, chunk)), 7));
}

// Any convolution of codes.
template <class V> bool prepare_dense(Step& s, Store& store) {
    Conv& c = *new (store.bytes(sizeof(Conv))) Conv();
    if (!finish_of(s, store, c.finish)) return false;
    const View &in = s.in[0], &out = s.out[0];
    const int channels = in.c + s.in[2].c, per_group = channels / s.group, outs = out.c / s.group;
    const bool flat = s.kernel[0] == 1 && s.kernel[1] == 1 && s.stride[0] == 1 && s.stride[1] == 1;  // then there are no pads
    const bool whole = s.group == 1 && s.dilation[1] == 1;  // rows of the window lie side by side

    // Blocks: as wide as registers allow; narrow ones where groups would be multiplied with zeros.
    const int widest = s.group == 1 || outs % (V::kWidest * V::kLanes) == 0 ? V::kWidest : 1;
    const int block_outs = widest * V::kLanes;
    c.blocks = over(out.c, block_outs);
    Block* blocks = reinterpret_cast<Block*>(store.bytes(sizeof(Block) * static_cast<size_t>(c.blocks)));
    c.block = blocks;
    const int8_t* weights = reinterpret_cast<const int8_t*>(s.constants[0]);
    const int32_t* bias = reinterpret_cast<const int32_t*>(s.constants[1]);
    const float* multiplier = reinterpret_cast<const float*>(s.constants[2]);
    const ptrdiff_t per_output = static_cast<ptrdiff_t>(s.kernel[0]) * s.kernel[1] * per_group;

    c.band_columns = (out.w - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
    c.band_pitch = up(c.band_columns * in.c * V::kUnit, 64);
    const int taps = whole ? s.kernel[0] : s.kernel[0] * s.kernel[1];
    const int most_runs = flat ? 2 : taps;
    size_t bytes = 0;  // of packed weights
    int first = 0;     // output of a block
    for (int i = 0; i < c.blocks; ++i) {
        Block& b = blocks[i];
        // of long sums, three vectors and two: a tile one vector wide reads an activation for every product
        const int left = out.c - first;
        const bool five = widest == 4 && over(left, V::kLanes) == 5 && per_output >= 512;
        b.first = first;
        b.count = least(left, five ? 3 * V::kLanes : block_outs);
        first += b.count;
        b.width = over(b.count, V::kLanes);
        const int channel = b.first / outs * per_group;
        const int channel_end = ((b.first + b.count - 1) / outs + 1) * per_group;
        Run* runs = reinterpret_cast<Run*>(store.bytes(sizeof(Run) * static_cast<size_t>(most_runs)));
        b.run = runs;
        if (flat && s.ints[2] && V::kUnit == 1) {
            runs[b.runs++] = {0, 0, over(in.c, 4), 0, 0, 1, 0, in.c};
            runs[b.runs++] = {1, 0, over(s.in[2].c, 4), 0, 0, 1, in.c, s.in[2].c};
        } else {
            const int columns = whole ? s.kernel[1] : 1;
            for (int t = 0; t < taps; ++t) {
                const int row = whole ? t : t / s.kernel[1], column = whole ? 0 : t % s.kernel[1];
                const ptrdiff_t offset = row * s.dilation[0] * c.band_pitch +
                                         (static_cast<ptrdiff_t>(column) * s.dilation[1] * in.c + channel) * V::kUnit;
                const int count = channel_end - channel;
                runs[b.runs++] = {0, flat ? static_cast<ptrdiff_t>(channel) * V::kUnit : offset,
                                  over(columns * count * V::kUnit, 4), row, column, columns, channel, count};
            }
        }
        b.next = static_cast<ptrdiff_t>(bytes);  // its own place, for now
        b.way = way_of<V>(s, b, whole && !flat);
        const int copies = b.way == Way::kStem3 || b.way == Way::kStem5 ? 2 : 1;  // one for every second pixel
        for (int r = 0; r < b.runs; ++r)
            bytes += static_cast<size_t>(b.run[r].groups) * static_cast<size_t>(b.width * V::kBytes * copies);
        int32_t* sums = reinterpret_cast<int32_t*>(store.bytes(4 * static_cast<size_t>(V::kWidest * V::kLanes)));
        float* scales = reinterpret_cast<float*>(store.bytes(4 * static_cast<size_t>(V::kWidest * V::kLanes)));
        for (int o = 0; o < b.count; ++o) {  // sum((a - zero) * w) = sum(a * w) - zero * sum(w), modulo 2^32
            uint32_t total = 0;
            const int lane = lane_of<V>(s, b, o);
            const int8_t* w = weights + (b.first + o) * per_output;
            for (ptrdiff_t k = 0; k < per_output; ++k) total += static_cast<uint32_t>(static_cast<int32_t>(w[k]));
            sums[lane] = static_cast<int32_t>(static_cast<uint32_t>(bias[b.first + o]) - static_cast<uint32_t>(in.zero) * total);
            scales[lane] = multiplier[b.first + o];
            const int twin = o + V::kLanes / 2;  // the same output of the other pixel
            if (b.way == Way::kHalf && o >= V::kLanes) sums[twin] = sums[o], scales[twin] = scales[o];
        }
        b.bias = sums;
        b.multiplier = scales;
        b.line = line_for<V>(b.width, b.way, c.finish.mode);
    }

    uint8_t* packed = store.bytes(bytes);
    for (int i = 0; i < c.blocks; ++i) {
        const ptrdiff_t at = blocks[i].next;
        pack_weights<V>(s, blocks[i], channels, packed + at);
        blocks[i].weights = packed + at;
        blocks[i].next = (i + 1 < c.blocks ? blocks[i + 1].next : 0) - at;
    }

    if (flat) {
        const int pixels = out.pixels();
        c.chunk = chunk_of(pixels, c.blocks);
        c.chunks = over(pixels, c.chunk);
        s.units = c.chunks * c.blocks;
        s.scratch = V::kUnit == 1 ? 0 : static_cast<size_t>(c.chunk) * static_cast<size_t>(channels) * V::kUnit + 64;
        s.run = run_flat<V>;
    } else {
        c.rows = least(out.h, most(1, over(96, out.w)));
        const int extent = (s.kernel[0] - 1) * s.dilation[0] + 1;
        while (c.rows < out.h && c.rows < 8 && static_cast<ptrdiff_t>(c.rows * s.stride[0] + extent) * c.band_pitch < 24576) ++c.rows;
        c.bands = over(out.h, c.rows);
        c.band_rows = (c.rows - 1) * s.stride[0] + extent;
        s.units = out.n * c.bands * c.blocks;
        s.scratch = static_cast<size_t>(c.band_rows) * static_cast<size_t>(c.band_pitch) + 64;
        s.run = run_bands<V>;
    }
    s.work = static_cast<uint64_t>(out.pixels()) * static_cast<uint64_t>(out.c) * static_cast<uint64_t>(per_output);
    s.prepared = &c;
    return true;
}

}  // namespace
}  // namespace edgekit
