// The definition: every operator as docs/native.md has it, in plain C++. Other sets give the same bits.
#include <cmath>
#include <cstring>

#include "float_math.h"
#include "kernels.h"

namespace edgekit {
namespace {

// Element (i, y, x, 0) of a tensor.
inline ptrdiff_t at(const View& v, int i, int y, int x) {
    return ((static_cast<ptrdiff_t>(i) * v.h + y) * v.w + x) * v.pitch;
}

template <typename T> struct Memory;
template <> struct Memory<uint8_t> {
    static uint8_t* of(const Frame& f, const View& v) { return f.bytes(v); }
};
template <> struct Memory<float> {
    static float* of(const Frame& f, const View& v) { return f.floats(v); }
};

template <typename T> const T* constant(const Step& s, int i) { return reinterpret_cast<const T*>(s.constants[i]); }

constexpr float kLargest = 1073741696.0f;  // the largest float below 2^30

inline uint8_t looked_up(const uint8_t* table, uint8_t code) { return table ? table[code] : code; }

// What quantize makes of a number.
inline uint8_t quantized(const Step& s, float a) {
    const float v = a * s.scalars[0];
    if (v != v) return sat8u(s.out[0].zero);
    return sat8u(rne(min_f32(max_f32(v, -kLargest), kLargest)) + s.out[0].zero);
}

// --- convolution ---

// The code before a residual.
inline uint8_t result(const Step& s, int32_t sum, int o) {
    const float value = static_cast<float>(sum) * constant<float>(s, 2)[o];
    if (s.act == Act::kNone) return sat8u(rne(value) + (s.in[1].c ? s.ints[1] : s.out[0].zero));
    if (s.act == Act::kTable) return s.constants[3][sat8u(rne(value) + s.ints[0])];
    const int16_t *base = constant<int16_t>(s, 3), *slope = base + 64;
    const int32_t r = sat16(rne(value)), u = sat16(r + s.ints[0]) > 0 ? sat16(r + s.ints[0]) : 0;
    const int32_t i = u >> 9, f = (u & 511) << 6;
    const int32_t y = sat16(base[i] + ((slope[i] * f + (1 << 14)) >> 15));
    return sat8u(sat16(y + 32) >> 6);
}

inline uint8_t with_residual(const Step& s, uint8_t q, uint8_t r) {
    const float sum = static_cast<float>(q - s.ints[1]) * s.scalars[0] + static_cast<float>(r - s.in[1].zero) * s.scalars[1];
    return looked_up(s.constants[4], sat8u(rne(sum) + s.out[0].zero));
}

inline int32_t dot(const uint8_t* a, const int8_t* w, int count, int zero) {
    int32_t sum = 0;
    for (int k = 0; k < count; ++k) sum += (a[k] - zero) * w[k];
    return sum;
}

void conv(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &more = s.in[2], &out = s.out[0];
    const int each = (in.c + more.c) / s.group, outs = out.c / s.group, zero = in.zero;
    const int8_t* weights = constant<int8_t>(s, 0);
    const ptrdiff_t count = static_cast<ptrdiff_t>(s.kernel[0]) * s.kernel[1] * each;
    for (int row = begin; row < end; ++row) {
        const int i = row / out.h, y = row % out.h;
        for (int x = 0; x < out.w; ++x)
            for (int o = 0; o < out.c; ++o) {
                const int8_t* w = weights + o * count;
                int32_t sum = constant<int32_t>(s, 1)[o];
                for (int ky = 0; ky < s.kernel[0]; ++ky) {
                    const int iy = y * s.stride[0] - s.pad[0] + ky * s.dilation[0];
                    for (int kx = 0; kx < s.kernel[1]; ++kx, w += each) {
                        const int ix = x * s.stride[1] - s.pad[1] + kx * s.dilation[1];
                        if (iy < 0 || iy >= in.h || ix < 0 || ix >= in.w) continue;  // code - zero is 0
                        const uint8_t* a = f.bytes(in) + at(in, i, iy, ix) + o / outs * each;
                        if (!more.c) {
                            sum += dot(a, w, each, zero);
                        } else {
                            sum += dot(a, w, in.c, zero);
                            sum += dot(f.bytes(more) + at(more, i, iy, ix), w + in.c, more.c, zero);
                        }
                    }
                }
                const ptrdiff_t to = at(out, i, y, x) + o;
                if (out.dtype == Dtype::kF32) {
                    f.floats(out)[to] = activate(s.act, static_cast<float>(sum) * constant<float>(s, 2)[o], s.scalars[2], s.scalars[3]);
                } else {
                    uint8_t q = result(s, sum, o);
                    if (s.in[1].c) q = with_residual(s, q, f.bytes(s.in[1])[at(s.in[1], i, y, x) + o]);
                    f.bytes(out)[to] = q;
                }
            }
    }
}

// --- element by element ---

// Calls each(element of the output, those of the inputs) for the rows of this part.
template <typename Out, typename In, typename Each>
inline void elements(const Step& s, const Frame& f, int begin, int end, Each each) {
    const View &in = s.in[0], &out = s.out[0];
    for (int row = begin; row < end; ++row)
        for (int x = 0; x < out.w; ++x) {
            const In* a = Memory<In>::of(f, in) + at(in, 0, row, x);
            Out* q = Memory<Out>::of(f, out) + at(out, 0, row, x);
            for (int k = 0; k < out.c; ++k) q[k] = each(a[k]);
        }
}

// The same for two inputs; the second one may have one pixel for each picture.
template <typename T, typename Each>
inline void pairs(const Step& s, const Frame& f, int begin, int end, Each each) {
    const View &in = s.in[0], &in2 = s.in[1], &out = s.out[0];
    const bool one = in2.h != out.h || in2.w != out.w;
    for (int row = begin; row < end; ++row)
        for (int x = 0; x < out.w; ++x) {
            const T* a = Memory<T>::of(f, in) + at(in, 0, row, x);
            const T* b = Memory<T>::of(f, in2) + (one ? at(in2, row / out.h, 0, 0) : at(in2, 0, row, x));
            T* q = Memory<T>::of(f, out) + at(out, 0, row, x);
            for (int k = 0; k < out.c; ++k) q[k] = each(a[k], b[k]);
        }
}

void add(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    pairs<uint8_t>(s, f, begin, end, [&](uint8_t a, uint8_t b) {
        const float sum = static_cast<float>(a - s.in[0].zero) * s.scalars[0] + static_cast<float>(b - s.in[1].zero) * s.scalars[1];
        return looked_up(s.constants[0], sat8u(rne(sum) + s.out[0].zero));
    });
}

void mul(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    pairs<uint8_t>(s, f, begin, end, [&](uint8_t a, uint8_t b) {
        const float product = static_cast<float>((a - s.in[0].zero) * (b - s.in[1].zero)) * s.scalars[0];
        return looked_up(s.constants[0], sat8u(rne(product) + s.out[0].zero));
    });
}

void table(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    elements<uint8_t, uint8_t>(s, f, begin, end, [&](uint8_t a) { return s.constants[0][a]; });
}

void quantize(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    elements<uint8_t, float>(s, f, begin, end, [&](float a) { return quantized(s, a); });
}

void dequantize(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    elements<float, uint8_t>(s, f, begin, end, [&](uint8_t a) { return constant<float>(s, 0)[a]; });
}

void copy_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    elements<float, float>(s, f, begin, end, [](float a) { return a; });
}

void unary_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    elements<float, float>(s, f, begin, end, [&](float a) { return activate(s.act, a, s.scalars[2], s.scalars[3]); });
}

void add_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    pairs<float>(s, f, begin, end, [](float a, float b) { return a + b; });
}

void mul_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    pairs<float>(s, f, begin, end, [](float a, float b) { return a * b; });
}

void softmax_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    for (int row = begin; row < end; ++row)
        for (int x = 0; x < out.w; ++x) {
            const float* a = f.floats(in) + at(in, 0, row, x);
            float* q = f.floats(out) + at(out, 0, row, x);
            float most = a[0], sum = 0.0f;
            for (int k = 1; k < out.c; ++k) most = max_f32(most, a[k]);
            for (int k = 0; k < out.c; ++k) sum += q[k] = exp_f32(a[k] - most);
            for (int k = 0; k < out.c; ++k) q[k] = q[k] / sum;
        }
}

// --- windows ---

// Calls each(element, of which pixel) for what of the window of output (y, x) lies inside the picture, in order.
template <typename T, typename Each>
inline int window(const Step& s, const T* in, int i, int y, int x, int k, Each each) {
    int count = 0;
    for (int ky = 0; ky < s.kernel[0]; ++ky) {
        const int iy = y * s.stride[0] - s.pad[0] + ky * s.dilation[0];
        if (iy < 0 || iy >= s.in[0].h) continue;
        for (int kx = 0; kx < s.kernel[1]; ++kx) {
            const int ix = x * s.stride[1] - s.pad[1] + kx * s.dilation[1];
            if (ix < 0 || ix >= s.in[0].w) continue;
            each(in[at(s.in[0], i, iy, ix) + k]);
            ++count;
        }
    }
    return count;
}

// Calls each(picture, row, column, channel) and stores what it gives, for the rows of this part.
template <typename T, typename Each> inline void outputs(const Step& s, const Frame& f, int begin, int end, Each each) {
    const View& out = s.out[0];
    for (int row = begin; row < end; ++row)
        for (int x = 0; x < out.w; ++x) {
            T* q = Memory<T>::of(f, out) + at(out, 0, row, x);
            for (int k = 0; k < out.c; ++k) q[k] = each(row / out.h, row % out.h, x, k);
        }
}

void max_pool(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const uint8_t* in = f.bytes(s.in[0]);
    outputs<uint8_t>(s, f, begin, end, [&](int i, int y, int x, int k) {
        uint8_t most = 0;
        window(s, in, i, y, x, k, [&](uint8_t a) { most = a > most ? a : most; });
        return looked_up(s.constants[0], most);
    });
}

void avg_pool(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const uint8_t* in = f.bytes(s.in[0]);
    outputs<uint8_t>(s, f, begin, end, [&](int i, int y, int x, int k) {
        int32_t sum = 0;
        int count = window(s, in, i, y, x, k, [&](uint8_t a) { sum += a - s.in[0].zero; });
        if (s.ints[0]) count = s.kernel[0] * s.kernel[1];
        const float scale = s.scalars[0] / static_cast<float>(count);
        return sat8u(rne(static_cast<float>(sum) * scale) + s.out[0].zero);
    });
}

void max_pool_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const float* in = f.floats(s.in[0]);
    outputs<float>(s, f, begin, end, [&](int i, int y, int x, int k) {
        bool first = true;
        float most = 0.0f;
        window(s, in, i, y, x, k, [&](float a) { most = first ? a : max_f32(most, a), first = false; });
        return most;
    });
}

void avg_pool_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const float* in = f.floats(s.in[0]);
    outputs<float>(s, f, begin, end, [&](int i, int y, int x, int k) {
        float sum = 0.0f;
        int count = window(s, in, i, y, x, k, [&](float a) { sum += a; });
        if (s.ints[0]) count = s.kernel[0] * s.kernel[1];
        return sum * (1.0f / static_cast<float>(count));
    });
}

void conv_f32(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View& in = s.in[0];
    const int each = in.c / s.group, outs = s.out[0].c / s.group;
    const ptrdiff_t count = static_cast<ptrdiff_t>(s.kernel[0]) * s.kernel[1] * each;
    const float* bias = constant<float>(s, 1);
    const auto result = [&](int i, int y, int x, int o) {
        const int8_t* bytes = constant<int8_t>(s, 0) + o * count;
        const float* floats = constant<float>(s, 0) + (s.ints[0] ? 0 : o * count);
        float sum = s.ints[0] ? 0.0f : bias[o];
        for (int ky = 0; ky < s.kernel[0]; ++ky)
            for (int kx = 0; kx < s.kernel[1]; ++kx) {
                const int iy = y * s.stride[0] - s.pad[0] + ky * s.dilation[0];
                const int ix = x * s.stride[1] - s.pad[1] + kx * s.dilation[1];
                if (iy < 0 || iy >= in.h || ix < 0 || ix >= in.w) continue;
                const float* a = f.floats(in) + at(in, i, iy, ix) + o / outs * each;
                const ptrdiff_t w = (static_cast<ptrdiff_t>(ky) * s.kernel[1] + kx) * each;
                for (int k = 0; k < each; ++k)
                    sum = std::fmaf(a[k], s.ints[0] ? static_cast<float>(bytes[w + k]) : floats[w + k], sum);
            }
        if (s.ints[0]) sum = std::fmaf(sum, constant<float>(s, 2)[o], bias[o]);
        return activate(s.act, sum, s.scalars[2], s.scalars[3]);
    };
    if (s.out[0].dtype == Dtype::kF32) outputs<float>(s, f, begin, end, result);
    else outputs<uint8_t>(s, f, begin, end, [&](int i, int y, int x, int o) { return quantized(s, result(i, y, x, o)); });
}

// --- resizing, channels ---

template <typename T> void nearest_of(const Step& s, const Frame& f, int begin, int end) {
    const T* in = Memory<T>::of(f, s.in[0]);
    outputs<T>(s, f, begin, end, [&](int i, int y, int x, int k) {
        const T a = in[at(s.in[0], i, constant<int32_t>(s, 0)[y], constant<int32_t>(s, 1)[x]) + k];
        return s.constants[2] ? static_cast<T>(s.constants[2][static_cast<uint8_t>(a)]) : a;
    });
}

void nearest(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    if (s.out[0].dtype == Dtype::kU8)
        nearest_of<uint8_t>(s, f, begin, end);
    else
        nearest_of<float>(s, f, begin, end);
}

inline float between(const Step& s, const float corner[4], int y, int x) {
    const float wy = constant<float>(s, 1)[y], wx = constant<float>(s, 3)[x];
    const float top = corner[0] + (corner[1] - corner[0]) * wx, bottom = corner[2] + (corner[3] - corner[2]) * wx;
    return top + (bottom - top) * wy;
}

void bilinear(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View& in = s.in[0];
    const auto corner = [&](int i, int y, int x, int k, int number) {
        return at(in, i, constant<int32_t>(s, 0)[2 * y + number / 2], constant<int32_t>(s, 2)[2 * x + number % 2]) + k;
    };
    if (s.out[0].dtype == Dtype::kU8)
        outputs<uint8_t>(s, f, begin, end, [&](int i, int y, int x, int k) {
            float v[4];
            for (int n = 0; n < 4; ++n) v[n] = static_cast<float>(f.bytes(in)[corner(i, y, x, k, n)] - in.zero);
            return sat8u(rne(between(s, v, y, x) * s.scalars[0]) + s.out[0].zero);
        });
    else
        outputs<float>(s, f, begin, end, [&](int i, int y, int x, int k) {
            float v[4];
            for (int n = 0; n < 4; ++n) v[n] = f.floats(in)[corner(i, y, x, k, n)];
            return between(s, v, y, x);
        });
}

template <typename T> void gather_of(const Step& s, const Frame& f, int begin, int end) {
    const T* in = Memory<T>::of(f, s.in[0]);
    outputs<T>(s, f, begin, end, [&](int i, int y, int x, int k) {
        const T a = in[at(s.in[0], i, y, x) + constant<int32_t>(s, 0)[k]];
        return s.constants[1] ? static_cast<T>(s.constants[1][static_cast<uint8_t>(a)]) : a;
    });
}

void gather(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    if (s.out[0].dtype == Dtype::kU8)
        gather_of<uint8_t>(s, f, begin, end);
    else
        gather_of<float>(s, f, begin, end);
}

// --- lists ---

struct Entry {
    OpType type;
    Run run;
};

const Entry kEntries[] = {
    {OpType::kConv, conv},
    {OpType::kAdd, add},
    {OpType::kMul, mul},
    {OpType::kTable, table},
    {OpType::kMaxPool, max_pool},
    {OpType::kAvgPool, avg_pool},
    {OpType::kNearest, nearest},
    {OpType::kBilinear, bilinear},
    {OpType::kGather, gather},
    {OpType::kQuantize, quantize},
    {OpType::kDequantize, dequantize},
    {OpType::kConvF32, conv_f32},
    {OpType::kAddF32, add_f32},
    {OpType::kMulF32, mul_f32},
    {OpType::kUnaryF32, unary_f32},
    {OpType::kMaxPoolF32, max_pool_f32},
    {OpType::kAvgPoolF32, avg_pool_f32},
    {OpType::kSoftmaxF32, softmax_f32},
    {OpType::kCopyF32, copy_f32},
};

bool here() { return true; }

bool prepare(Step& s, Store&) {
    for (const Entry& entry : kEntries) {
        if (entry.type != s.type) continue;
        s.run = entry.run;
        const bool products = s.type == OpType::kConv || s.type == OpType::kConvF32;
        return by_rows(s, 4 * window_size(s) * (products ? static_cast<uint64_t>((s.in[0].c + s.in[2].c) / s.group) : 1));
    }
    return false;
}

}  // namespace

const Isa kScalar = {"scalar", here, prepare};

}  // namespace edgekit
