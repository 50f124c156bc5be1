// Operators that look at codes one by one, at windows without weights, or move them, for any x86 set V.
// Units are rows of the output, of all pictures.
#pragma once

#include <cstring>

#include "codes.h"

namespace edgekit {
namespace {

// Some pixels, each so many codes: what two inputs (or one) give, each(a, b), is stored.
struct Span {
    const uint8_t *a, *b;
    uint8_t* q;
    ptrdiff_t a_step, b_step, q_step;
    int pixels, channels;
};

template <class V, int P, class Each> EK_INLINE void narrow(const Span& s, Each each) {
    int m = 0;
    for (; m + P <= s.pixels; m += P)
        V::template scatter<P>(s.q + m * s.q_step, s.q_step,
                               each(V::template gather<P>(s.a + m * s.a_step, s.a_step),
                                    V::template gather<P>(s.b + m * s.b_step, s.b_step)),
                               s.channels);
    for (; m < s.pixels; ++m)
        V::template scatter<1>(s.q + m * s.q_step, 0, each(V::load(s.a + m * s.a_step), V::load(s.b + m * s.b_step)), s.channels);
}

template <class V, class Each> EK_INLINE void over_span(const Span& s, Each each) {
    if (s.pixels >= 2 && s.channels <= V::kBytes / 4) return narrow<V, 4>(s, each);
    if (s.pixels >= 2 && s.channels <= V::kBytes / 2) return narrow<V, 2>(s, each);
    for (int m = 0; m < s.pixels; ++m) {
        const uint8_t *a = s.a + m * s.a_step, *b = s.b + m * s.b_step;
        uint8_t* q = s.q + m * s.q_step;
        for (int k = 0; k < s.channels; k += V::kBytes)
            V::template scatter<1>(q + k, 0, each(V::load(a + k), V::load(b + k)), s.channels - k);
    }
}

inline const uint8_t* row_of(const View& v, const Frame& f, int row) { return f.bytes(v) + static_cast<ptrdiff_t>(row) * v.w * v.pitch; }

// Rows [begin, end) of operators whose tensors all have the same pixels; b may be the same as a, or one pixel a picture.
template <class V, class Each> EK_INLINE void over_rows(const View& a, const View& b, const View& q, const Frame& f, int begin, int end, Each each) {
    const bool one = b.h != q.h || b.w != q.w;
    Span s = {row_of(a, f, begin), nullptr, f.bytes(q) + static_cast<ptrdiff_t>(begin) * q.w * q.pitch, a.pitch, one ? 0 : b.pitch, q.pitch,
              (end - begin) * q.w, q.c};
    if (one) {
        s.pixels = q.w;
        for (int row = begin; row < end; ++row) {
            s.b = f.bytes(b) + row / q.h * b.pitch;
            over_span<V>(s, each);
            s.a += q.w * a.pitch;
            s.q += q.w * q.pitch;
        }
        return;
    }
    s.b = row_of(b, f, begin);
    if (a.pitch == a.c && b.pitch == b.c && q.pitch == q.c) s.channels *= s.pixels, s.pixels = 1;
    over_span<V>(s, each);
}

template <class V> void run_add(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const Blender<V> blender({s.in[0].zero, s.in[1].zero, s.out[0].zero, s.scalars[0], s.scalars[1], s.constants[0]});
    over_rows<V>(s.in[0], s.in[1], s.out[0], f, begin, end, [&](typename V::I a, typename V::I b) { return blender.of(a, b); });
}

template <class V> void run_mul(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    using I = typename V::I;
    using F = typename V::F;
    const F za = Reals<V>::offset(s.in[0].zero), zb = Reals<V>::offset(s.in[1].zero), scale = V::setf(s.scalars[0]);
    const I zero = V::set16(s.out[0].zero);
    const bool looks = s.constants[0] != nullptr;
    const typename V::Table table = V::table(looks ? s.constants[0] : kSame.codes);
    over_rows<V>(s.in[0], s.in[1], s.out[0], f, begin, end, [&](I a, I b) {
        const Reals<V> x(a, za), y(b, zb);
        const auto part = [&](int i) { return V::mulf(V::mulf(x.part[i], y.part[i]), scale); };  // the product is exact
        const I codes = codes_of<V>(part(0), part(1), part(2), part(3), zero);
        return looks ? V::look(table, codes) : codes;
    });
}

template <class V> void run_table(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const typename V::Table table = V::table(s.constants[0]);
    over_rows<V>(s.in[0], s.in[0], s.out[0], f, begin, end, [&](typename V::I a, typename V::I) { return V::look(table, a); });
}

template <class V> void run_nearest(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    const int32_t *rows = reinterpret_cast<const int32_t*>(s.constants[0]), *columns = reinterpret_cast<const int32_t*>(s.constants[1]);
    const bool looks = s.constants[2] != nullptr;
    const typename V::Table table = V::table(looks ? s.constants[2] : kSame.codes);
    for (int row = begin; row < end; ++row) {
        const uint8_t* from = row_of(in, f, row / out.h * in.h + rows[row % out.h]);
        uint8_t* to = f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        for (int k = 0; k < out.c; k += V::kBytes) {
            typename V::I v = V::set32(0);
            int column = -1;
            for (int x = 0; x < out.w; ++x) {
                if (columns[x] != column) {
                    column = columns[x];
                    v = V::load(from + column * in.pitch + k);
                    if (looks) v = V::look(table, v);
                }
                V::template scatter<1>(to + x * out.pitch + k, 0, v, out.c - k);
            }
        }
    }
}

// Largest codes of `taps` places `across` bytes apart, of pixels side by side.
template <class V, int P> EK_INLINE void largest(const Span& s, int taps, ptrdiff_t across, const typename V::Table* table) {
    for (int m = 0; m < s.pixels; m += P) {
        for (int k = 0; k < s.channels; k += V::kBytes / P) {
            const uint8_t* a = s.a + m * s.a_step + k;
            typename V::I v = V::template gather<P>(a, s.a_step);
            for (int i = 1; i < taps; ++i) v = V::max8(v, V::template gather<P>(a + i * across, s.a_step));
            if (table) v = V::look(*table, v);
            V::template scatter<P>(s.q + m * s.q_step + k, s.q_step, v, s.channels - k);
        }
    }
}

// The largest codes of each column of the window's rows, then of the columns that an output sees.
template <class V> void run_max_pool(const Step& s, const Frame& f, int begin, int end, uint8_t* scratch) {
    const View &in = s.in[0], &out = s.out[0];
    const typename V::Table table = V::table(s.constants[0] ? s.constants[0] : kSame.codes);
    const typename V::Table* looks = s.constants[0] ? &table : nullptr;
    const ptrdiff_t across = s.dilation[1] * in.c, down = static_cast<ptrdiff_t>(s.dilation[0]) * in.w * in.pitch;
    const int extent = (s.kernel[1] - 1) * s.dilation[1] + 1;
    const int first = over(s.pad[1], s.stride[1]);  // outputs from here on see no pads, as far as the last one of these
    const int last = in.w < extent ? first : least(out.w, (in.w - extent + s.pad[1]) / s.stride[1] + 1);
    const bool flat = in.pitch == in.c;
    for (int row = begin; row < end; ++row) {
        const Inside rows = inside(row % out.h * s.stride[0] - s.pad[0], s.kernel[0], s.dilation[0], in.h);
        Span column = {row_of(in, f, row / out.h * in.h + rows.first), nullptr, scratch, in.pitch, 0, in.c,
                       flat ? 1 : in.w, flat ? in.w * in.c : in.c};
        largest<V, 1>(column, rows.count, down, nullptr);
        uint8_t* to = f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        for (int x = 0; x < out.w;) {
            const Inside seen = inside(x * s.stride[1] - s.pad[1], s.kernel[1], s.dilation[1], in.w);
            Span line = {scratch + seen.first * in.c, nullptr, to + x * out.pitch, s.stride[1] * in.c, 0, out.pitch, 1, out.c};
            if (x >= first && x < last) line.pixels = last - x;
            const int count = line.pixels;
            if (out.c <= V::kBytes / 2 && count > 1) {
                line.pixels = count / 2 * 2;
                if (out.c <= V::kBytes / 4 && count >= 4) line.pixels = count / 4 * 4, largest<V, 4>(line, seen.count, across, looks);
                else largest<V, 2>(line, seen.count, across, looks);
            } else {
                largest<V, 1>(line, seen.count, across, looks);
            }
            x += line.pixels;
        }
    }
}

template <class V> void run_avg_pool(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    using I = typename V::I;
    const View &in = s.in[0], &out = s.out[0];
    const I zero = V::set16(out.zero), o = V::set32(0);
    const ptrdiff_t across = s.dilation[1] * in.pitch, down = static_cast<ptrdiff_t>(s.dilation[0]) * in.w * in.pitch;
    for (int row = begin; row < end; ++row) {
        const Inside rows = inside(row % out.h * s.stride[0] - s.pad[0], s.kernel[0], s.dilation[0], in.h);
        uint8_t* to = f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        const uint8_t* from = row_of(in, f, row / out.h * in.h + rows.first);
        for (int x = 0; x < out.w; ++x, to += out.pitch) {
            const Inside columns = inside(x * s.stride[1] - s.pad[1], s.kernel[1], s.dilation[1], in.w);
            const int seen = rows.count * columns.count, count = s.ints[0] ? s.kernel[0] * s.kernel[1] : seen;
            const typename V::F scale = V::setf(s.scalars[0] / static_cast<float>(count));
            const I offset = V::set32(static_cast<int32_t>(static_cast<uint32_t>(seen) * static_cast<uint32_t>(in.zero)));
            for (int k = 0; k < out.c; k += V::kBytes) {
                const uint8_t* p = from + columns.first * in.pitch + k;
                I sum[4] = {o, o, o, o};
                for (int y = 0; y < rows.count; ++y)
                    for (int i = 0; i < columns.count; ++i) {
                        const I v = V::load(p + y * down + i * across), l = V::low8(v, o), h = V::high8(v, o);
                        sum[0] = V::add32(sum[0], V::low16(l, o)), sum[1] = V::add32(sum[1], V::high16(l, o));
                        sum[2] = V::add32(sum[2], V::low16(h, o)), sum[3] = V::add32(sum[3], V::high16(h, o));
                    }
                for (int j = 0; j < 4; ++j) sum[j] = V::rne(V::mulf(V::real(V::sub32(sum[j], offset)), scale));
                const I v = V::bytes(V::add16(V::words(sum[0], sum[1]), zero), V::add16(V::words(sum[2], sum[3]), zero));
                V::template scatter<1>(to + k, 0, v, out.c - k);
            }
        }
    }
}

// Real numbers between the columns of a row of the input: vectors of channels for each output, in the order of Reals.
template <class V> void between_columns(const Step& s, const uint8_t* from, float* to) {
    using F = typename V::F;
    const View &in = s.in[0], &out = s.out[0];
    const int32_t* columns = reinterpret_cast<const int32_t*>(s.constants[2]);
    const float* weights = reinterpret_cast<const float*>(s.constants[3]);
    const F za = Reals<V>::offset(in.zero);
    for (int x = 0; x < out.w; ++x) {
        const ptrdiff_t left = columns[2 * x] * in.pitch, right = columns[2 * x + 1] * in.pitch;
        const F w = V::setf(weights[x]);
        for (int k = 0; k < out.c; k += V::kBytes, to += V::kBytes) {
            const Reals<V> a(V::load(from + left + k), za), b(V::load(from + right + k), za);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) V::storef(to + i * V::kLanes, V::addf(a.part[i], V::mulf(V::subf(b.part[i], a.part[i]), w)));
        }
    }
}

// What it makes of a row of the input serves all rows of the output that lie beside it.
template <class V> void run_bilinear(const Step& s, const Frame& f, int begin, int end, uint8_t* scratch) {
    using F = typename V::F;
    const View &in = s.in[0], &out = s.out[0];
    const int32_t* rows = reinterpret_cast<const int32_t*>(s.constants[0]);
    const float* weights = reinterpret_cast<const float*>(s.constants[1]);
    const typename V::I zero = V::set16(out.zero);
    const F scale = V::setf(s.scalars[0]);
    float* line[2] = {reinterpret_cast<float*>(scratch), reinterpret_cast<float*>(scratch) + out.w * up(out.c, V::kBytes)};
    int held[2] = {-1, -1};  // rows of the input
    for (int row = begin; row < end; ++row) {
        const int y = row % out.h, first = row / out.h * in.h;
        if (held[1] == first + rows[2 * y] && held[0] != held[1]) {  // the lower one becomes the upper one
            float* const upper = line[0];
            line[0] = line[1], line[1] = upper;
            held[0] = held[1], held[1] = -1;
        }
        for (int i = 0; i < 2; ++i) {
            if (held[i] == first + rows[2 * y + i]) continue;
            held[i] = first + rows[2 * y + i];
            between_columns<V>(s, row_of(in, f, held[i]), line[i]);
        }
        const F w = V::setf(weights[y]);
        const float *top = line[0], *bottom = line[1];
        uint8_t* to = f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch;
        for (int x = 0; x < out.w; ++x, to += out.pitch) {
            for (int k = 0; k < out.c; k += V::kBytes, top += V::kBytes, bottom += V::kBytes) {
                const auto part = [&](int i) {
                    const F t = V::loadf(top + i * V::kLanes), u = V::loadf(bottom + i * V::kLanes);
                    return V::mulf(V::addf(t, V::mulf(V::subf(u, t), w)), scale);
                };
                V::template scatter<1>(to + k, 0, codes_of<V>(part(0), part(1), part(2), part(3), zero), out.c - k);
            }
        }
    }
}

template <class V> void run_quantize(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    const float* a = f.floats(in) + static_cast<ptrdiff_t>(begin) * in.w * in.pitch;
    uint8_t* q = f.bytes(out) + static_cast<ptrdiff_t>(begin) * out.w * out.pitch;
    quantize<V>(s.scalars[0], out.zero, a, in.pitch, q, out.pitch, (end - begin) * out.w, out.c);
}

template <class V> void run_dequantize(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const View &in = s.in[0], &out = s.out[0];
    const typename V::Floats table(reinterpret_cast<const float*>(s.constants[0]), static_cast<const uint8_t*>(s.prepared));
    const bool flat = in.pitch == in.c && out.pitch == out.c;
    const int channels = flat ? (end - begin) * out.w * out.c : out.c, pixels = flat ? 1 : (end - begin) * out.w;
    const uint8_t* a = row_of(in, f, begin);
    float* q = f.floats(out) + static_cast<ptrdiff_t>(begin) * out.w * out.pitch;
    for (int m = 0; m < pixels; ++m, a += in.pitch, q += out.pitch) table.look(a, q, channels);
}

// Channels by index. The outputs of a vector come from windows of V::kWindow neighbouring inputs, each of which gives some.
struct Window {
    int first;
    bool wide;             // some lie V::kBytes and more from the first one
    const uint8_t* picks;  // V::kBytes places in the window; 0x80: not from this one
};

struct Gather {
    const Window* window = nullptr;
    const int* windows = nullptr;  // of each vector of outputs
};

// A vector of outputs of some pixels, from one window.
template <class V, bool Wide> EK_INLINE void gather_one(const Window& window, const Span& s, const typename V::Table* table) {
    const typename V::I picks = V::load(window.picks);
    for (int m = 0; m < s.pixels; ++m) {
        typename V::I v = V::template pick<Wide>(V::set32(0), s.a + m * s.a_step + window.first, picks);
        if (table) v = V::look(*table, v);
        V::template scatter<1>(s.q + m * s.q_step, 0, v, s.channels);
    }
}

template <class V> EK_INLINE void gather_some(const Window* window, int windows, const Span& s, const typename V::Table* table) {
    for (int m = 0; m < s.pixels; ++m) {
        typename V::I v = V::set32(0);
        for (int i = 0; i < windows; ++i) {
            const uint8_t* from = s.a + m * s.a_step + window[i].first;
            const typename V::I picks = V::load(window[i].picks);
            v = window[i].wide ? V::template pick<true>(v, from, picks) : V::template pick<false>(v, from, picks);
        }
        if (table) v = V::look(*table, v);
        V::template scatter<1>(s.q + m * s.q_step, 0, v, s.channels);
    }
}

template <class V> void run_gather(const Step& s, const Frame& f, int begin, int end, uint8_t*) {
    const Gather& g = *static_cast<const Gather*>(s.prepared);
    const View &in = s.in[0], &out = s.out[0];
    const typename V::Table table = V::table(s.constants[1] ? s.constants[1] : kSame.codes);
    const typename V::Table* looks = s.constants[1] ? &table : nullptr;
    for (int row = begin; row < end; ++row) {
        const Window* window = g.window;
        for (int k = 0, vector = 0; k < out.c; k += V::kBytes, window += g.windows[vector++]) {
            const Span span = {row_of(in, f, row), nullptr, f.bytes(out) + static_cast<ptrdiff_t>(row) * out.w * out.pitch + k,
                               in.pitch, 0, out.pitch, out.w, out.c - k};
            if (g.windows[vector] > 1) gather_some<V>(window, g.windows[vector], span, looks);
            else if (window->wide) gather_one<V, true>(*window, span, looks);
            else gather_one<V, false>(*window, span, looks);
        }
    }
}

template <class V> const Gather* prepare_gather(const Step& s, Store& store) {
    const int32_t* index = reinterpret_cast<const int32_t*>(s.constants[0]);
    const int count = s.out[0].c;
    Gather& g = *new (store.bytes(sizeof(Gather))) Gather();
    Window* window = store.array<Window>(static_cast<size_t>(count));
    int* windows = store.array<int>(static_cast<size_t>(over(count, V::kBytes)));
    g.window = window;
    g.windows = windows;
    for (int k = 0; k < count; k += V::kBytes) {
        const int here = least(V::kBytes, count - k);
        bool given[V::kBytes] = {};
        for (int left = here; left > 0; ++window, ++windows[k / V::kBytes]) {
            int first = INT32_MAX;
            for (int i = 0; i < here; ++i)
                if (!given[i]) first = least(first, index[k + i]);
            uint8_t* picks = store.bytes(V::kBytes);
            *window = {first, false, picks};
            for (int i = 0; i < V::kBytes; ++i) {
                const bool mine = i < here && !given[i] && index[k + i] - first < V::kWindow;
                picks[i] = mine ? static_cast<uint8_t>(index[k + i] - first) : 0x80;
                if (mine) given[i] = true, --left, window->wide |= picks[i] >= V::kBytes;
            }
        }
    }
    return &g;
}

template <class V> bool prepare_pixels(Step& s, Store& store) {
    if (s.in[0].dtype != Dtype::kU8 && s.type != OpType::kQuantize) return false;
    uint64_t work = 4 * window_size(s);
    size_t scratch = 0;
    switch (s.type) {
        case OpType::kAdd: s.run = run_add<V>; break;
        case OpType::kMul: s.run = run_mul<V>; break;
        case OpType::kTable: s.run = run_table<V>; break;
        case OpType::kNearest: s.run = run_nearest<V>; break;
        case OpType::kMaxPool:
            s.run = run_max_pool<V>;
            scratch = static_cast<size_t>(s.in[0].w) * static_cast<size_t>(s.in[0].c) + 64;
            work = window_size(s);
            break;
        case OpType::kAvgPool: s.run = run_avg_pool<V>; break;
        case OpType::kBilinear:
            s.run = run_bilinear<V>, work = 16;
            scratch = 2 * sizeof(float) * static_cast<size_t>(s.out[0].w) * static_cast<size_t>(up(s.out[0].c, V::kBytes));
            break;
        case OpType::kGather: s.run = run_gather<V>, s.prepared = prepare_gather<V>(s, store); break;
        case OpType::kQuantize: s.run = run_quantize<V>; break;
        case OpType::kDequantize:
            s.run = run_dequantize<V>;
            s.prepared = V::Floats::prepare(reinterpret_cast<const float*>(s.constants[0]), store);
            break;
        default: return false;
    }
    return by_rows(s, work, scratch);
}

}  // namespace
}  // namespace edgekit
