// Depthwise convolutions of codes, for any x86 set V.
//
// Four codes of a window are woven into groups of four bytes, one group for every channel, and multiplied at once: of a 3x3
// window the columns; of a 5x5 window the columns of the upper four rows, and four neighbours of the last row.
// A vector holds V::kBytes channels of a pixel or, where there are fewer, those of P pixels that lie some way apart in the row.
#pragma once

#include <cstring>

#include "codes.h"

namespace edgekit {
namespace {

struct Depthwise;

// Channels that are computed together.
struct Piece {
    int channel = 0, channels = 0;     // first one, and how many are stored
    int apart = 0, width = 0;          // outputs from one of the P pixels to the next, and outputs computed for each
    const uint8_t* weights = nullptr;  // [group of four taps][quarter of the channels]
    const int32_t* bias = nullptr;     // [quarter]
    const float* multiplier = nullptr;
    void (*rows)(const Step&, const Frame&, const Depthwise&, const Piece&, int begin, int end, uint8_t* scratch) = nullptr;
};

struct Depthwise {
    Finish finish;
    int pieces = 0;
    const Piece* piece = nullptr;
    const uint8_t* pad = nullptr;  // a row of pads
};

// The four bytes of channels: vectors j of the weave of rows a, b, c, d hold channels 16 * lane + 4 * j ...
template <class V> EK_INLINE void weave(typename V::I a, typename V::I b, typename V::I c, typename V::I d, typename V::I (&q)[4]) {
    const typename V::I ab = V::low8(a, b), cd = V::low8(c, d), ab2 = V::high8(a, b), cd2 = V::high8(c, d);
    q[0] = V::low16(ab, cd), q[1] = V::high16(ab, cd), q[2] = V::low16(ab2, cd2), q[3] = V::high16(ab2, cd2);
}

// Two things that are rare and much code, by themselves: codes of P pixels of a row, some of which are pads, ...
template <class V, int P>
__attribute__((noinline)) typename V::I edge(const uint8_t* row, ptrdiff_t pitch, int at, int apart, int columns, int zero) {
    constexpr int kPiece = V::kBytes / P;
    alignas(64) uint8_t pieces[V::kBytes];
    for (int p = 0; p < P; ++p, at += apart) {
        if (at < 0 || at >= columns) std::memset(pieces + p * kPiece, zero, kPiece);
        else std::memcpy(pieces + p * kPiece, row + at * pitch, kPiece);
    }
    return V::load(pieces);
}

// ... and codes to which a residual is added.
template <class V, int P>
__attribute__((noinline)) typename V::I blended(const Blend& how, typename V::I codes, const uint8_t* residual, ptrdiff_t step) {
    return Blender<V>(how).of(codes, V::template gather<P>(residual, step));
}

// What a row of outputs of a piece reads and writes.
template <class V, int K, int S, int P> struct Sight {
    static constexpr int kPiece = V::kBytes / P;
    const uint8_t* row[K];
    uint8_t* to;
    const uint8_t* residual;
    int columns, apart, zero, left;
    ptrdiff_t pitch;

    EK_INLINE Sight(const Step& s, const Frame& frame, const Depthwise& d, const Piece& p, int unit) {
        const View &in = s.in[0], &out = s.out[0];
        const int picture = unit / out.h, top = unit % out.h * S - s.pad[0];
        const ptrdiff_t first = static_cast<ptrdiff_t>(unit) * out.w;
        for (int k = 0; k < K; ++k) {
            const int y = top + k;
            const bool there = y >= 0 && y < in.h;
            row[k] = there ? frame.bytes(in) + p.channel + (static_cast<ptrdiff_t>(picture) * in.h + y) * in.w * in.pitch : d.pad;
        }
        to = frame.bytes(out) + p.channel + first * out.pitch;
        residual = d.finish.residual ? frame.bytes(s.in[1]) + p.channel + first * s.in[1].pitch : nullptr;
        columns = in.w, apart = p.apart * S, zero = in.zero, left = s.pad[1], pitch = in.pitch;
    }
    // Codes of row k in a column of the window's, counted from the first one that the first output sees.
    EK_INLINE typename V::I codes(int k, int column) const {
        const int at = column - left;
        if (at >= 0 && at + (P - 1) * apart < columns) return V::template gather<P>(row[k] + at * pitch, apart * pitch);
        return P == 1 ? V::set8(zero) : edge<V, P>(row[k], pitch, at, apart, columns, zero);
    }
    // Stores output x of its sums.
    EK_INLINE void put(const Step& s, const Depthwise& d, const Piece& p, const AnyCodes<V>& codes, int x, const typename V::I (&sum)[4]) const {
        typename V::I q[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) q[j] = V::scale(sum[j], p.multiplier + j * V::kLanes);
        typename V::I v = codes.of(q[0], q[1], q[2], q[3]);
        const ptrdiff_t step = s.out[0].pitch;
        if (residual) v = blended<V, P>(d.finish.blend, v, residual + x * s.in[1].pitch, p.apart * s.in[1].pitch);
        if (p.channels == kPiece) V::template scatter<P>(to + x * step, p.apart * step, v);
        else V::template scatter<P>(to + x * step, p.apart * step, v, p.channels);
    }
};

// 3x3: a column is woven once and adds to all outputs that see it, which are held in registers, as all weights are.
template <class V, int S, int P> void rows_3x3(const Step& s, const Frame& frame, const Depthwise& d, const Piece& p, int begin, int end, uint8_t*) {
    using I = typename V::I;
    constexpr int K = 3, kHeld = (K + S - 1) / S;  // outputs that see a column
    const AnyCodes<V> codes(d.finish);
    constexpr bool kHold = V::kRegisters == 32;
    typename V::Quad held[kHold ? 12 : 1];
    if (kHold) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) held[kHold ? i : 0] = V::quad(p.weights + i * V::kQuad);
    }
    for (int unit = begin; unit < end; ++unit) {
        const Sight<V, K, S, P> sight(s, frame, d, p, unit);
        I sum[kHeld][4];
#pragma GCC unroll 8
        for (int i = 0; i < kHeld; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[i][j] = V::set32(0);
        }
        for (int x = 0; x < p.width + kHeld - 1; ++x) {
#pragma GCC unroll 8
            for (int i = kHeld - 1; i > 0; --i) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sum[i][j] = sum[i - 1][j];
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[0][j] = V::load(p.bias + j * V::kLanes);
#pragma GCC unroll 2
            for (int column = 0; column < S; ++column) {
                I woven[4];
                const int at = x * S + column;
                const I last = sight.codes(2, at);  // a fourth row has weights of 0
                weave<V>(sight.codes(0, at), sight.codes(1, at), last, last, woven);
#pragma GCC unroll 8
                for (int i = 0; i < kHeld; ++i) {
                    const int tap = column + S * i;
                    if (tap >= K) continue;
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) {
                        if (kHold) V::dot_quad(sum[i][j], woven[j], held[kHold ? tap * 4 + j : 0]);
                        else V::dot_quad(sum[i][j], woven[j], p.weights + (tap * 4 + j) * V::kQuad);
                    }
                }
            }
            if (x >= kHeld - 1) sight.put(s, d, p, codes, x - (kHeld - 1), sum[kHeld - 1]);
        }
    }
}

// 5x5: some columns of a row are woven ahead, then outputs are computed a few at a time, a quarter of the channels after
// the other, so that sums and weights stay in registers. Groups: the columns of rows 0-3, four taps of row 4, its last one.
constexpr int kSpan = 32;  // outputs whose columns are woven at a time

template <class V, int S, int P> EK_INLINE void weave_5x5(const Sight<V, 5, S, P>& sight, int first, int columns, uint8_t* to) {
    using I = typename V::I;
    I next[4];  // of row 4
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) next[i + 1] = sight.codes(4, first + i);
    for (int x = first; x < first + columns; ++x, to += 8 * V::kBytes) {
        I woven[4];
        weave<V>(sight.codes(0, x), sight.codes(1, x), sight.codes(2, x), sight.codes(3, x), woven);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) V::store(to + j * V::kBytes, woven[j]);
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) next[i] = next[i + 1];
        next[3] = sight.codes(4, x + 3);
        if (S == 2 && (x - first) % 2) continue;  // outputs begin at even ones
        weave<V>(next[0], next[1], next[2], next[3], woven);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) V::store(to + (4 + j) * V::kBytes, woven[j]);
    }
}

template <class V, int S, int N> EK_INLINE void sum_5x5(const Piece& p, const uint8_t* woven, typename V::I (&sum)[N][4]) {
    using I = typename V::I;
    constexpr int kColumns = S * (N - 1) + 5;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        typename V::Quad w[7];
#pragma GCC unroll 7
        for (int i = 0; i < 7; ++i) w[i] = V::quad(p.weights + (i * 4 + j) * V::kQuad);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[n][j] = V::load(p.bias + j * V::kLanes);
#pragma GCC unroll 16
        for (int x = 0; x < kColumns; ++x) {
            const I above = V::load(woven + (8 * x + j) * V::kBytes);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                if (x >= S * n && x < S * n + 5) V::dot_quad(sum[n][j], above, w[x >= S * n && x < S * n + 5 ? x - S * n : 0]);
            if (S == 2 && x % 2) continue;
            const I last = V::load(woven + (8 * x + 4 + j) * V::kBytes);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                if (x == S * n) V::dot_quad(sum[n][j], last, w[5]);
                if (x == S * n + 4) V::dot_quad(sum[n][j], last, w[6]);
            }
        }
    }
}

template <class V, int S, int P>
void rows_5x5(const Step& s, const Frame& frame, const Depthwise& d, const Piece& p, int begin, int end, uint8_t* scratch) {
    constexpr int N = V::kRegisters == 32 ? 4 : 1;  // outputs that share what is read; of few registers most are the weights'
    const AnyCodes<V> codes(d.finish);
    for (int unit = begin; unit < end; ++unit) {
        const Sight<V, 5, S, P> sight(s, frame, d, p, unit);
        for (int first = 0; first < p.width; first += kSpan) {
            const int count = least(kSpan, p.width - first);
            weave_5x5<V, S, P>(sight, first * S, (count - 1) * S + 5, scratch);
            for (int x = 0; x < count; x += N) {
                typename V::I sum[N][4];
                const uint8_t* woven = scratch + static_cast<ptrdiff_t>(x) * S * 8 * V::kBytes;
                if (N > 1 && count - x < N) {  // one by one
                    for (int i = x; i < count; ++i, woven += S * 8 * V::kBytes) {
                        typename V::I one[1][4];
                        sum_5x5<V, S, 1>(p, woven, one);
                        sight.put(s, d, p, codes, first + i, one[0]);
                    }
                    break;
                }
                sum_5x5<V, S, N>(p, woven, sum);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sight.put(s, d, p, codes, first + x + n, sum[n]);
            }
        }
    }
}

template <class V> void run_depthwise(const Step& s, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const Depthwise& d = *static_cast<const Depthwise*>(s.prepared);
    for (int i = 0; i < d.pieces; ++i) d.piece[i].rows(s, frame, d, d.piece[i], begin, end, scratch);
}

// Pixels side by side in a vector at most, where there are few channels: 5x5 is much code, and 8 channels are rare.
template <class V> constexpr int most_pixels(int size) { return size == 5 && V::kBytes < 64 ? 2 : 4; }

template <class V, int S> auto rows_of(int size, int pixels) {
    if (size == 5) return pixels == 4 ? rows_5x5<V, S, most_pixels<V>(5)> : pixels == 2 ? rows_5x5<V, S, 2> : rows_5x5<V, S, 1>;
    return pixels == 4 ? rows_3x3<V, S, 4> : pixels == 2 ? rows_3x3<V, S, 2> : rows_3x3<V, S, 1>;
}

// Which group of four taps, and which of the four, a tap of the window is.
struct Tap {
    int group, row;
};
inline Tap tap_of(int y, int x) {
    if (y < 4) return {x, y};
    return x < 4 ? Tap{5, x} : Tap{6, 0};
}

// Weights, sums of pads and multipliers of the channels of a piece, where weave() leaves them.
template <class V> void pack_piece(const Step& s, Store& store, int pixels, Piece& p) {
    const int size = s.kernel[0], groups = size == 5 ? 7 : 3;
    uint8_t* weights = store.bytes(static_cast<size_t>(groups) * 4 * V::kQuad);
    int32_t* bias = reinterpret_cast<int32_t*>(store.bytes(4 * V::kBytes));
    float* multiplier = reinterpret_cast<float*>(store.bytes(4 * V::kBytes));
    const int8_t* from = reinterpret_cast<const int8_t*>(s.constants[0]);
    for (int at = 0; at < V::kBytes; ++at) {
        const int j = at / V::kLanes, i = at % V::kLanes;
        const int k = (i / 4 * 16 + 4 * j + i % 4) % (V::kBytes / pixels);
        if (k >= p.channels) continue;
        const int8_t* w = from + (p.channel + k) * size * size;
        int32_t total = 0;
        for (int y = 0; y < size; ++y) {
            for (int x = 0; x < size; ++x) {
                const Tap tap = tap_of(y, x);
                total += w[y * size + x];
                V::put_quad(weights + (tap.group * 4 + j) * V::kQuad, i, tap.row, w[y * size + x]);
            }
        }
        const int32_t given = reinterpret_cast<const int32_t*>(s.constants[1])[p.channel + k];
        bias[at] = static_cast<int32_t>(static_cast<uint32_t>(given) - static_cast<uint32_t>(s.in[0].zero) * static_cast<uint32_t>(total));
        multiplier[at] = reinterpret_cast<const float*>(s.constants[2])[p.channel + k];
    }
    p.weights = weights;
    p.bias = bias;
    p.multiplier = multiplier;
}

// Windows of 3x3 and 5x5. What it refuses, prepare_dense() does.
template <class V> bool prepare_depthwise(Step& s, Store& store) {
    const View &in = s.in[0], &out = s.out[0];
    const int size = s.kernel[0], stride = s.stride[0], c = in.c;
    const bool mine = s.group == c && out.c == c && out.dtype == Dtype::kU8 && s.kernel[1] == size && (size == 3 || size == 5) &&
                      s.stride[1] == stride && (stride == 1 || stride == 2) && s.dilation[0] == 1 && s.dilation[1] == 1;
    if (!mine) return false;
    Depthwise& d = *new (store.bytes(sizeof(Depthwise))) Depthwise();
    if (!finish_of(s, store, d.finish)) return false;
    const size_t row = static_cast<size_t>(in.w) * static_cast<size_t>(in.pitch) + V::kBytes;
    uint8_t* pad = store.bytes(row);
    std::memset(pad, in.zero, row);
    d.pad = pad;

    d.pieces = over(c, V::kBytes);
    Piece* pieces = store.array<Piece>(static_cast<size_t>(d.pieces));
    d.piece = pieces;
    for (int i = 0; i < d.pieces; ++i) {
        Piece& p = *new (pieces + i) Piece();
        const int left = c - i * V::kBytes;
        int pixels = left <= V::kBytes / 4 ? most_pixels<V>(size) : left <= V::kBytes / 2 ? 2 : 1;
        if (out.w < 2 * pixels) pixels = 1;
        p.channels = least(pixels == 1 ? c : left, V::kBytes);
        p.channel = pixels == 1 ? least(i * V::kBytes, c - p.channels) : i * V::kBytes;  // may overlap the piece before
        p.width = out.w;
        if (pixels > 1) {  // (pixels - 1) * apart + width = out.w, apart <= width
            p.apart = (out.w - over(out.w, pixels)) / (pixels - 1);
            p.width = out.w - (pixels - 1) * p.apart;
        }
        p.rows = stride == 1 ? rows_of<V, 1>(size, pixels) : rows_of<V, 2>(size, pixels);
        pack_piece<V>(s, store, pixels, p);
    }
    s.run = run_depthwise<V>;
    s.prepared = &d;
    return by_rows(s, window_size(s), size == 5 ? static_cast<size_t>((kSpan - 1) * stride + 5) * 8 * V::kBytes : 0);
}

}  // namespace
}  // namespace edgekit
