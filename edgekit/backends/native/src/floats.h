// Operators of float32 tensors, for any set V. Units are rows of the output, of all pictures.
// Every element is computed by the same operations in the same order as scalar.cpp has them.
#pragma once

#include <cstring>

#include "functions.h"

namespace edgekit {
namespace {

// --- element by element ---

// q = each(a, b) of count elements.
template <class V, class Each> EK_INLINE void over_floats(const float* a, const float* b, float* q, ptrdiff_t count, Each each) {
    ptrdiff_t k = 0;
    for (; k + V::kLanes <= count; k += V::kLanes) V::storef(q + k, each(V::loadf(a + k), V::loadf(b + k)));
    if (k == count) return;
    const int left = static_cast<int>(count - k);
    V::storef(q + k, each(V::loadf(a + k, left), V::loadf(b + k, left)), left);
}

inline const float* float_row(const View& v, const Frame& f, int row) { return f.floats(v) + static_cast<ptrdiff_t>(row) * v.w * v.pitch; }

// Rows of tensors that have the same pixels; b may be a itself, or have one pixel a picture.
template <class V, class Each> EK_INLINE void over_float_rows(const View& a, const View& b, const View& q, const Frame& f, int begin, int end, Each each) {
    const bool one = b.h != q.h || b.w != q.w;
    const ptrdiff_t b_step = one ? 0 : b.pitch;
    for (int row = begin; row < end; ++row) {
        const float *from = float_row(a, f, row), *other = one ? f.floats(b) + row / q.h * b.pitch : float_row(b, f, row);
        float* to = f.floats(q) + static_cast<ptrdiff_t>(row) * q.w * q.pitch;
        if (!one && a.pitch == a.c && b.pitch == b.c && q.pitch == q.c) {
            over_floats<V>(from, other, to, static_cast<ptrdiff_t>(q.w) * q.c, each);
            continue;
        }
        for (int x = 0; x < q.w; ++x) over_floats<V>(from + x * a.pitch, other + x * b_step, to + x * q.pitch, q.c, each);
    }
}

template <class V> void run_add_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    over_float_rows<V>(s.in[0], s.in[1], s.out[0], f, begin, end, [&](typename V::F a, typename V::F b) { return V::addf(a, b); });
}

template <class V> void run_mul_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    over_float_rows<V>(s.in[0], s.in[1], s.out[0], f, begin, end, [&](typename V::F a, typename V::F b) { return V::mulf(a, b); });
}

template <class V> void run_copy_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    over_float_rows<V>(s.in[0], s.in[0], s.out[0], f, begin, end, [&](typename V::F a, typename V::F) { return a; });
}

template <class V> void run_unary_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    float* to = f.floats(out) + static_cast<ptrdiff_t>(begin) * out.w * out.pitch;
    activate<V>(activation(s), float_row(in, f, begin), in.pitch, to, out.pitch, (end - begin) * out.w, out.c);
}

template <class V> void run_softmax_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    for (int row = begin; row < end; ++row)
        for (int x = 0; x < out.w; ++x) {
            const float* a = float_row(in, f, row) + x * in.pitch;
            float* q = f.floats(out) + (static_cast<ptrdiff_t>(row) * out.w + x) * out.pitch;
            float top = a[0], sum = 0.0f;
            for (int k = 1; k < out.c; ++k) top = top > a[k] ? top : a[k];
            const typename V::F most = V::setf(top);
            over_floats<V>(a, a, q, out.c, [&](typename V::F v, typename V::F) { return exp_of<V>(V::subf(v, most)); });
            for (int k = 0; k < out.c; ++k) sum += q[k];
            const typename V::F all = V::setf(sum);
            over_floats<V>(q, q, q, out.c, [&](typename V::F v, typename V::F) { return V::divf(v, all); });
        }
}

// --- windows ---

template <class V, bool Max> void run_pool_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    using F = typename V::F;
    const View &in = s.in[0], &out = s.out[0];
    const ptrdiff_t across = s.dilation[1] * in.pitch, down = static_cast<ptrdiff_t>(s.dilation[0]) * in.w * in.pitch;
    for (int row = begin; row < end; ++row) {
        const Inside rows = inside(row % out.h * s.stride[0] - s.pad[0], s.kernel[0], s.dilation[0], in.h);
        const float* from = float_row(in, f, row / out.h * in.h + rows.first);
        float* to = f.floats(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        for (int x = 0; x < out.w; ++x, to += out.pitch) {
            const Inside columns = inside(x * s.stride[1] - s.pad[1], s.kernel[1], s.dilation[1], in.w);
            const int count = s.ints[0] ? s.kernel[0] * s.kernel[1] : rows.count * columns.count;
            const F scale = V::setf(1.0f / static_cast<float>(count));
            for (int k = 0; k < out.c; k += V::kLanes) {
                const float* p = from + columns.first * in.pitch + k;
                const int left = out.c - k;
                F v = Max ? V::loadf(p, left) : V::setf(0.0f);
                for (int y = 0; y < rows.count; ++y)
                    for (int i = 0; i < columns.count; ++i) {
                        const F a = V::loadf(p + y * down + i * across, left);
                        v = Max ? (y || i ? V::maxf(v, a) : v) : V::addf(v, a);
                    }
                if (!Max) v = V::mulf(v, scale);
                if (left >= V::kLanes) V::storef(to + k, v);
                else V::storef(to + k, v, left);
            }
        }
    }
}

// Weights are reordered to [block][row][column][channel][outputs of the block]; a block lies in one group.
struct FloatBlock {
    int first, count, width;  // outputs, vectors
    int channel;              // of its group
    const float* weights;
    const float *bias, *scale;
};

struct FloatConv {
    int blocks = 0, channels = 0;  // of a group
    bool depthwise = false;
    const FloatBlock* block = nullptr;
};

// Sums of MR pixels over the taps [row0, row1) x [column0, column1), which are all inside.
template <class V, int MR, int NB>
EK_INLINE void tile_f32(const Step& s, const FloatConv& c, const FloatBlock& b, const float* in, float* out, ptrdiff_t pitch, const Inside& rows, int row0, const Inside& columns, int column0) {
    using F = typename V::F;
    F sum[MR][NB];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
        const F start = b.scale ? V::setf(0.0f) : V::loadf(b.bias + n * V::kLanes);
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) sum[m][n] = start;
    }
    const ptrdiff_t step = s.stride[1] * s.in[0].pitch;
    const ptrdiff_t across = s.dilation[1] * s.in[0].pitch, down = static_cast<ptrdiff_t>(s.dilation[0]) * s.in[0].w * s.in[0].pitch;
    for (int y = 0; y < rows.count; ++y)
        for (int x = 0; x < columns.count; ++x) {
            const float* a = in + y * down + x * across;
            const float* w = b.weights + (static_cast<ptrdiff_t>(row0 + y) * s.kernel[1] + column0 + x) * c.channels * b.width * V::kLanes;
            for (int k = 0; k < c.channels; ++k, ++a, w += NB * V::kLanes) {
                F weight[NB];
#pragma GCC unroll 4
                for (int n = 0; n < NB; ++n) weight[n] = V::loadf(w + n * V::kLanes);
#pragma GCC unroll 12
                for (int m = 0; m < MR; ++m) {
                    const F v = V::setf(a[m * step]);
#pragma GCC unroll 4
                    for (int n = 0; n < NB; ++n) sum[m][n] = V::fma(v, weight[n], sum[m][n]);
                }
            }
        }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) {
            F v = sum[m][n];
            if (b.scale) v = V::fma(v, V::loadf(b.scale + n * V::kLanes), V::loadf(b.bias + n * V::kLanes));
            float* to = out + m * pitch + n * V::kLanes;
            if (b.count - n * V::kLanes >= V::kLanes) V::storef(to, v);
            else V::storef(to, v, b.count - n * V::kLanes);
        }
    }
}

template <class V, int NB> void rows_f32(const Step& s, const FloatConv& c, const FloatBlock& b, const Frame& f, int begin, int end, float* out_row, ptrdiff_t pitch) {
    constexpr int MR = NB == 1 ? 12 : 6;
    const View &in = s.in[0], &out = s.out[0];
    const bool flat = s.kernel[0] == 1 && s.kernel[1] == 1 && s.stride[0] == 1 && s.stride[1] == 1;
    const int width = flat ? (end - begin) * out.w : out.w;  // rows of a pointwise convolution are one long row
    float* to = out_row + b.first;
    for (int row = begin; row < (flat ? begin + 1 : end); ++row, to += out.w * pitch) {
        const int top = row % out.h * s.stride[0] - s.pad[0];
        const Inside rows = flat ? Inside{0, 1} : inside(top, s.kernel[0], s.dilation[0], in.h);
        const int row0 = flat ? 0 : (rows.first - top) / s.dilation[0];
        const float* from = (flat ? float_row(in, f, row) : float_row(in, f, row / out.h * in.h + rows.first)) + b.channel;
        const int reach = (s.kernel[1] - 1) * s.dilation[1];
        // outputs whose windows lie inside
        int first = flat ? 0 : least(out.w, over(s.pad[1], s.stride[1]));
        int last = flat ? width : in.w + s.pad[1] - reach <= 0 ? 0 : least(out.w, (in.w + s.pad[1] - reach - 1) / s.stride[1] + 1);
        if (last - first < MR) first = last = 0;
        for (int x = 0; x < width;) {
            if (x >= first && x < last) {
                const int at = least(x, last - MR);
                const ptrdiff_t left = static_cast<ptrdiff_t>(at) * s.stride[1] - s.pad[1];
                tile_f32<V, MR, NB>(s, c, b, from + left * in.pitch, to + at * pitch, pitch, rows, row0, {0, s.kernel[1]}, 0);
                x = at + MR;
                continue;
            }
            const int left = x * s.stride[1] - s.pad[1];
            const Inside columns = flat ? Inside{x, 1} : inside(left, s.kernel[1], s.dilation[1], in.w);
            const int column0 = flat ? 0 : (columns.first - left) / s.dilation[1];
            tile_f32<V, 1, NB>(s, c, b, from + columns.first * in.pitch, to + x * pitch, pitch, rows, row0, columns, column0);
            ++x;
        }
    }
}

// The sums of some rows, pixels `pitch` floats apart.
template <class V> void dense_f32(const Step& s, const FloatConv& c, const Frame& f, int begin, int end, float* to, ptrdiff_t pitch) {
    for (int i = 0; i < c.blocks; ++i) {
        const FloatBlock& b = c.block[i];
        if (b.width == 1) rows_f32<V, 1>(s, c, b, f, begin, end, to, pitch);
        else if (b.width == 2) rows_f32<V, 2>(s, c, b, f, begin, end, to, pitch);
        else rows_f32<V, V::kWidest>(s, c, b, f, begin, end, to, pitch);
    }
}

// Outputs [x, end) of one vector of channels whose 3x3 windows lie inside, with the weights in registers.
template <class V, bool Whole> void middle_f32(const Step& s, const FloatBlock& b, const float* a, float* to, ptrdiff_t pitch, int count, const float* w, ptrdiff_t w_step, int k, int pixels) {
    using F = typename V::F;
    const View& in = s.in[0];
    const ptrdiff_t across = s.dilation[1] * in.pitch, down = static_cast<ptrdiff_t>(s.dilation[0]) * in.w * in.pitch;
    F weight[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) weight[i] = V::loadf(w + i * w_step);
    const bool scaled = b.scale != nullptr;  // copies: what is stored might change what is behind the pointers
    const ptrdiff_t step = s.stride[1] * in.pitch;
    const F bias = V::loadf(b.bias + k), scale = scaled ? V::loadf(b.scale + k) : bias, start = scaled ? V::setf(0.0f) : bias;
    for (int x = 0; x < pixels; ++x, a += step, to += pitch) {
        F sum = start;
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) {
            const float* at = a + i / 3 * down + i % 3 * across;
            sum = V::fma(Whole ? V::loadf(at) : V::loadf(at, count), weight[i], sum);
        }
        if (scaled) sum = V::fma(sum, scale, bias);
        if (Whole) V::storef(to, sum);
        else V::storef(to, sum, count);
    }
}

// Each channel by itself: weights [row][column][channel].
template <class V> void depthwise_f32(const Step& s, const FloatConv& c, const Frame& f, int begin, int end, float* to, ptrdiff_t pitch) {
    using F = typename V::F;
    const FloatBlock& b = *c.block;
    const View &in = s.in[0], &out = s.out[0];
    const ptrdiff_t across = s.dilation[1] * in.pitch, down = static_cast<ptrdiff_t>(s.dilation[0]) * in.w * in.pitch;
    const ptrdiff_t padded = up(out.c, V::kLanes);
    const int reach = (s.kernel[1] - 1) * s.dilation[1];
    const int first = least(out.w, over(s.pad[1], s.stride[1]));
    const int last = in.w + s.pad[1] - reach <= 0 ? 0 : least(out.w, (in.w + s.pad[1] - reach - 1) / s.stride[1] + 1);
    for (int row = begin; row < end; ++row, to += out.w * pitch) {
        const int top = row % out.h * s.stride[0] - s.pad[0];
        const Inside rows = inside(top, s.kernel[0], s.dilation[0], in.h);
        const int row0 = (rows.first - top) / s.dilation[0];
        const float* from = float_row(in, f, row / out.h * in.h + rows.first);
        const bool fast = s.kernel[0] == 3 && s.kernel[1] == 3 && rows.count == 3 && first < last;
        for (int k = 0; k < out.c; k += V::kLanes) {
            const int count = out.c - k;
            for (int x = 0; x < out.w; ++x) {
                const int left = x * s.stride[1] - s.pad[1];
                if (fast && x == first) {
                    const auto middle = count >= V::kLanes ? middle_f32<V, true> : middle_f32<V, false>;
                    middle(s, b, from + left * in.pitch + k, to + x * pitch + k, pitch, count, b.weights + k, padded, k, last - first);
                    x = last - 1;
                    continue;
                }
                const Inside columns = inside(left, s.kernel[1], s.dilation[1], in.w);
                const int column0 = (columns.first - left) / s.dilation[1];
                const float* a = from + columns.first * in.pitch + k;
                const float* w = b.weights + (static_cast<ptrdiff_t>(row0) * s.kernel[1] + column0) * padded + k;
                F sum = b.scale ? V::setf(0.0f) : V::loadf(b.bias + k);
                for (int y = 0; y < rows.count; ++y)
                    for (int i = 0; i < columns.count; ++i)
                        sum = V::fma(V::loadf(a + y * down + i * across, count), V::loadf(w + (y * s.kernel[1] + i) * padded), sum);
                if (b.scale) sum = V::fma(sum, V::loadf(b.scale + k), V::loadf(b.bias + k));
                float* q = to + x * pitch + k;
                if (count >= V::kLanes) V::storef(q, sum);
                else V::storef(q, sum, count);
            }
        }
    }
}

template <class V> void run_conv_f32(const Step& s, const Frame& f, int begin, int end, uint8_t* scratch) {
    const FloatConv& c = *static_cast<const FloatConv*>(s.prepared);
    const View& out = s.out[0];
    const auto some = [&](int first, int last, float* to, ptrdiff_t pitch) {
        if (c.depthwise) depthwise_f32<V>(s, c, f, first, last, to, pitch);
        else dense_f32<V>(s, c, f, first, last, to, pitch);
        if (s.act != Act::kNone) activate<V>(activation(s), to, pitch, to, pitch, (last - first) * out.w, out.c);
    };
    if (out.dtype == Dtype::kF32) {
        const int step = c.depthwise ? 1 : end - begin;  // of the others, weights are read once for all rows
        for (int row = begin; row < end; row += step)
            some(row, row + step, f.floats(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch, out.pitch);
        return;
    }
    float* sums = reinterpret_cast<float*>(scratch);
    for (int row = begin; row < end; ++row) {
        some(row, row + 1, sums, out.c);
        uint8_t* to = f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        quantize<V>(s.scalars[0], out.zero, sums, out.c, to, out.pitch, out.w, out.c);
    }
}

template <class V> void prepare_conv_f32(Step& s, Store& store) {
    FloatConv& c = *new (store.bytes(sizeof(FloatConv))) FloatConv();
    const View &in = s.in[0], &out = s.out[0];
    const int outs = out.c / s.group, taps = s.kernel[0] * s.kernel[1];
    c.channels = in.c / s.group;
    c.depthwise = s.group > 1 && c.channels == 1 && outs == 1;
    const int widest = c.depthwise ? up(out.c, V::kLanes) : V::kWidest * V::kLanes;
    const int blocks_of_group = over(outs, V::kWidest * V::kLanes);
    c.blocks = c.depthwise ? 1 : s.group * blocks_of_group;
    FloatBlock* blocks = reinterpret_cast<FloatBlock*>(store.bytes(sizeof(FloatBlock) * static_cast<size_t>(c.blocks)));
    c.block = blocks;
    const auto weight = [&](int o, int tap, int k) {
        const ptrdiff_t at = (static_cast<ptrdiff_t>(o) * taps + tap) * c.channels + k;
        return s.ints[0] ? static_cast<float>(reinterpret_cast<const int8_t*>(s.constants[0])[at])
                         : reinterpret_cast<const float*>(s.constants[0])[at];
    };
    for (int i = 0; i < c.blocks; ++i) {
        FloatBlock& b = blocks[i];
        const int group = i / blocks_of_group, within = c.depthwise ? 0 : i % blocks_of_group * widest;
        b.first = c.depthwise ? 0 : group * outs + within;
        b.count = c.depthwise ? out.c : least(widest, outs - within);
        b.width = over(b.count, V::kLanes);
        if (!c.depthwise && b.width > 2) b.width = V::kWidest;  // three vectors are computed as four
        b.channel = c.depthwise ? 0 : group * c.channels;
        const ptrdiff_t padded = static_cast<ptrdiff_t>(b.width) * V::kLanes;
        float* weights = reinterpret_cast<float*>(store.bytes(4 * static_cast<size_t>(taps * padded) * static_cast<size_t>(c.channels)));
        float* bias = reinterpret_cast<float*>(store.bytes(4 * static_cast<size_t>(padded)));
        float* scale = reinterpret_cast<float*>(store.bytes(4 * static_cast<size_t>(padded)));
        for (int o = 0; o < b.count; ++o) {
            bias[o] = reinterpret_cast<const float*>(s.constants[1])[b.first + o];
            if (s.ints[0]) scale[o] = reinterpret_cast<const float*>(s.constants[2])[b.first + o];
            for (int t = 0; t < taps; ++t)
                for (int k = 0; k < c.channels; ++k)
                    weights[(static_cast<ptrdiff_t>(t) * c.channels + k) * padded + o] = weight(b.first + o, t, k);
        }
        b.weights = weights;
        b.bias = bias;
        b.scale = s.ints[0] ? scale : nullptr;
    }
    s.prepared = &c;
    s.run = run_conv_f32<V>;
}

template <class V> bool prepare_floats(Step& s, Store& store) {
    const View& out = s.out[0];
    uint64_t work = 4 * window_size(s);
    size_t scratch = 0;
    switch (s.type) {
        case OpType::kConvF32:
            prepare_conv_f32<V>(s, store);
            work *= static_cast<uint64_t>(s.in[0].c / s.group);
            if (out.dtype == Dtype::kU8) scratch = sizeof(float) * static_cast<size_t>(out.w) * static_cast<size_t>(out.c);
            break;
        case OpType::kAddF32: s.run = run_add_f32<V>; break;
        case OpType::kMulF32: s.run = run_mul_f32<V>; break;
        case OpType::kCopyF32: s.run = run_copy_f32<V>; break;
        case OpType::kUnaryF32: s.run = run_unary_f32<V>, work = 16; break;
        case OpType::kSoftmaxF32: s.run = run_softmax_f32<V>, work = 32; break;
        case OpType::kMaxPoolF32: s.run = run_pool_f32<V, true>; break;
        case OpType::kAvgPoolF32: s.run = run_pool_f32<V, false>; break;
        default: return false;
    }
    return by_rows(s, work, scratch);
}

}  // namespace
}  // namespace edgekit
