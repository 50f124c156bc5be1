// Dense, grouped and pointwise convolutions of codes: one tile of outputs held in registers, for any x86 set V.
//
// A line of pixels lies at equal steps in memory. Its sums run over "runs": bytes that lie side by side for a pixel and
// are multiplied four (V::kUnit = 1) or two (V::kUnit = 2) at a time: a pointwise convolution has one run, a kxk one has a
// run for every row of its window, in a copy with pads. Weights of outputs that are computed together lie as they are read.
#pragma once

#include <cstring>

#include "codes.h"

namespace edgekit {
namespace {

struct Run {
    int source;        // 0, or 1: the second input of a pointwise convolution
    ptrdiff_t offset;  // bytes from the pixel
    int groups;        // of four bytes
    int row, column, columns, channel, channels;  // which weights
};

struct Block;

struct Line {
    const uint8_t* in[2];
    ptrdiff_t in_step[2];
    uint8_t* out;
    ptrdiff_t out_step;
    const uint8_t* residual;
    ptrdiff_t residual_step;
    int pixels;
    int before;  // tiles that the block's weights met before this line
};

// A tile one vector wide reads an activation for every product, which is more than the loads can do. Where neighbours' windows
// overlap, a group is read once for all pixels that see it.
enum class Way {
    kAny,
    kRow3,            // 3 columns, one pixel apart, of whole groups
    kStem3, kStem5,   // first layers: so many groups a line, pixels kStemStep bytes apart (2 pixels of 3 channels; 3x3 and 6x6)
    kHalf,            // one vector of outputs and a half: the half of two pixels share one
};

// Outputs that are computed together.
struct Block {
    int first, count;
    int width;  // in vectors
    Way way;
    int runs;
    const Run* run;
    const uint8_t* weights;
    ptrdiff_t next;  // from there to those of the block that comes after this one
    const int32_t* bias;
    const float* multiplier;
    void (*line)(const Finish&, const Block&, const Line&);
};

template <class V, int MR, int NB> EK_INLINE void sum(const Block& b, const Line& l, int first, typename V::I (&s)[MR][NB]) {
    using I = typename V::I;
    // weights that stay in a register while all pixels are multiplied; where sums leave none for the last, it is read each time
    constexpr int kHeld = MR * NB + NB < V::kRegisters ? NB : NB - 1;
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
        const I bias = V::load(b.bias + n * V::kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) s[m][n] = bias;
    }
    const uint8_t* w = b.weights;
    // Small maps read much more weights than pixels: those of the next block are asked for, each tile in turn for one line of a group's.
    constexpr int kLines = NB * V::kBytes / 64;
    constexpr bool kAsks = NB == V::kWidest;
    const ptrdiff_t next = kAsks ? b.next + (l.before + first / MR) % kLines * 64 : 0;
    for (int r = 0; r < b.runs; ++r) {
        const Run& run = b.run[r];
        const ptrdiff_t step = l.in_step[run.source];
        const uint8_t* from[(MR + 2) / 3];  // x86 addresses three equal steps from one pointer
#pragma GCC unroll 6
        for (int i = 0; i < (MR + 2) / 3; ++i) from[i] = l.in[run.source] + run.offset + (first + 3 * i) * step;
        for (int g = run.groups; g > 0; --g) {
            I weight[kHeld];
#pragma GCC unroll 4
            for (int n = 0; n < kHeld; ++n) weight[n] = V::load(w + n * V::kBytes);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                const I a = V::group(from[m / 3] + m % 3 * step);
#pragma GCC unroll 4
                for (int n = 0; n < kHeld; ++n) V::dot(s[m][n], a, weight[n]);
                if constexpr (kHeld < NB) V::dot(s[m][kHeld], a, w + kHeld * V::kBytes);
            }
            if (kAsks) __builtin_prefetch(w + next, 0, 2);
            w += NB * V::kBytes;
#pragma GCC unroll 6
            for (int i = 0; i < (MR + 2) / 3; ++i) from[i] += 4;
        }
    }
}

template <class V, int MR> EK_INLINE void sum_row3(const Block& b, const Line& l, int first, typename V::I (&s)[MR][1]) {
    using I = typename V::I;
    const I bias = V::load(b.bias);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) s[m][0] = bias;
    const ptrdiff_t step = l.in_step[0];
    const uint8_t* w = b.weights;
    for (int r = 0; r < b.runs; ++r) {
        const int groups = b.run[r].groups / 3;
        const ptrdiff_t column = static_cast<ptrdiff_t>(groups) * V::kBytes;
        const uint8_t* from[(MR + 4) / 3];
#pragma GCC unroll 7
        for (int i = 0; i < (MR + 4) / 3; ++i) from[i] = l.in[0] + b.run[r].offset + (first + 3 * i) * step;
        for (int g = groups; g > 0; --g) {
            const I weight[3] = {V::load(w), V::load(w + column), V::load(w + 2 * column)};
            w += V::kBytes;
#pragma GCC unroll 18
            for (int x = 0; x < MR + 2; ++x) {
                const I a = V::group(from[x / 3] + x % 3 * step);
#pragma GCC unroll 3
                for (int i = 0; i < 3; ++i)
                    if (x >= i && x - i < MR) V::dot(s[x >= i && x - i < MR ? x - i : 0][0], a, weight[i]);
            }
#pragma GCC unroll 7
            for (int i = 0; i < (MR + 4) / 3; ++i) from[i] += 4;
        }
        w += 2 * column;
    }
}

// Pixels are one and a half groups apart: of every second one the weights lie two bytes later (kStemShift), from a group that
// the one before sees too.
constexpr int kStemStep = 6, kStemShift = 2;

template <class V, int MR, int G> EK_INLINE void sum_stem(const Block& b, const Line& l, int first, typename V::I (&s)[MR][1]) {
    using I = typename V::I;
    const I bias = V::load(b.bias);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) s[m][0] = bias;
    const uint8_t* w = b.weights;
    for (int r = 0; r < b.runs; ++r, w += 2 * G * V::kBytes) {
        I weight[2 * G];
#pragma GCC unroll 10
        for (int g = 0; g < 2 * G; ++g) weight[g] = V::load(w + g * V::kBytes);
        const uint8_t* from = l.in[0] + b.run[r].offset + first * l.in_step[0];
#pragma GCC unroll 32
        for (int k = 0; k < MR / 2 * 3 - 2 + G; ++k) {
            const I a = V::group(from + 4 * k);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                const int g = k - (m / 2 * 3 + m % 2);
                if (g >= 0 && g < G) V::dot(s[m][0], a, weight[m % 2 * G + (g >= 0 && g < G ? g : 0)]);
            }
        }
    }
}

// s: the first vector of outputs of every pixel; halves: the rest of two pixels.
template <class V, int MR> EK_INLINE void sum_half(const Block& b, const Line& l, int first, typename V::I (&s)[MR], typename V::I (&halves)[MR / 2]) {
    using I = typename V::I;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) s[m] = V::load(b.bias);
#pragma GCC unroll 8
    for (int m = 0; m < MR / 2; ++m) halves[m] = V::load(b.bias + V::kLanes);
    const uint8_t* w = b.weights;
    for (int r = 0; r < b.runs; ++r) {
        const ptrdiff_t step = l.in_step[b.run[r].source];
        const uint8_t* from[(MR + 2) / 3];
#pragma GCC unroll 6
        for (int i = 0; i < (MR + 2) / 3; ++i) from[i] = l.in[b.run[r].source] + b.run[r].offset + (first + 3 * i) * step;
        for (int g = b.run[r].groups; g > 0; --g, w += 2 * V::kBytes) {
            const I weight = V::load(w), half = V::load(w + V::kBytes);
#pragma GCC unroll 8
            for (int m = 0; m < MR; m += 2) {
                const I a = V::group(from[m / 3] + m % 3 * step), c = V::group(from[(m + 1) / 3] + (m + 1) % 3 * step);
                V::dot(s[m], a, weight);
                V::dot(s[m + 1], c, weight);
                V::dot(halves[m / 2], V::two_halves(a, c), half);
            }
#pragma GCC unroll 6
            for (int i = 0; i < (MR + 2) / 3; ++i) from[i] += 4;
        }
    }
}

template <class V, int MR, int NB, Way W> EK_INLINE void sum_by(const Block& b, const Line& l, int first, typename V::I (&s)[MR][NB]) {
    if constexpr (W == Way::kRow3) sum_row3<V, MR>(b, l, first, s);
    else if constexpr (W == Way::kStem3) sum_stem<V, MR, 3>(b, l, first, s);
    else if constexpr (W == Way::kStem5) sum_stem<V, MR, 5>(b, l, first, s);
    else sum<V, MR, NB>(b, l, first, s);
}

// The real results of MR pixels, through `function`.
template <class V, int MR, int NB, class Function>
EK_INLINE void store_reals(const Block& b, const Line& l, int first, typename V::I (&s)[MR][NB], Function function) {
    constexpr int kLast = (NB - 1) * V::kLanes;
    const float* const multiplier = b.multiplier;  // copies: what is stored might change what is behind the pointers
    const ptrdiff_t step = l.out_step;
    const int last = b.count - kLast;
    uint8_t* to = l.out + first * step;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m, to += step) {
        float* real = reinterpret_cast<float*>(to);
#pragma GCC unroll 4
        for (int n = 0; n < NB; ++n) {
            const typename V::F x = function(V::mulf(V::real(s[m][n]), V::loadf(multiplier + n * V::kLanes)));
            if (n < NB - 1) V::storef(real + n * V::kLanes, x);
            else V::storef(real + kLast, x, last);
        }
    }
}

// Adds the residual to codes of a tile, which lie in vectors of P pixels, and stores them.
template <class V, int P> __attribute__((noinline)) void blend(const Blend& how, const uint8_t* codes, int count, const Line& l, int first, int pixels) {
    const Blender<V> blender(how);
    for (int m = 0; m < pixels; m += P, codes += V::kBytes) {
        const typename V::I r = V::template gather<P>(l.residual + (first + m) * l.residual_step, l.residual_step);
        V::template scatter<P>(l.out + (first + m) * l.out_step, l.out_step, blender.of(V::load(codes), r), count);
    }
}

// Tables and the like of a line. 32 registers are full of sums, and take them for each tile after those; 16 never hold them all.
template <class V, Mode M, bool Late = (V::kRegisters == 32)> struct Finisher {
    const Finish& how;
    const Codes<V, M> codes;
    EK_INLINE explicit Finisher(const Finish& f) : how(f), codes(f) {}
    EK_INLINE const Codes<V, M>& now() const { return codes; }
};
template <class V, Mode M> struct Finisher<V, M, true> {
    const Finish& how;
    EK_INLINE explicit Finisher(const Finish& f) : how(f) {}
    EK_INLINE Codes<V, M> now() const {
        const Finish* f = &how;
        asm("" : "+r"(f));  // not before
        return Codes<V, M>(*f);
    }
};

// The codes of MR pixels, P of them in a vector: of(m) are the scaled sums of pixel m and those after it, as packing takes them.
template <class V, int MR, int P, Mode M, class Of> EK_INLINE void store_codes(const Finisher<V, M>& f, const Block& b, const Line& l, int first, bool whole, Of of) {
    const Codes<V, M>& codes = f.now();
    const int count = b.count;  // a copy: what is stored might change what is behind the pointer
    const ptrdiff_t step = l.out_step;
    uint8_t* to = l.out + first * step;
    const bool blends = f.how.residual;
    alignas(64) uint8_t kept[MR / P * V::kBytes];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m += P, to += P * step) {
        const typename V::I v = codes.look(of(codes, m));
        if (__builtin_expect(blends, 0)) V::store(kept + m / P * V::kBytes, v);
        else if (__builtin_expect(whole, 1)) V::template scatter<P>(to, step, v);
        else V::template scatter<P>(to, step, v, count);
    }
    if (blends) blend<V, P>(f.how.blend, kept, count, l, first, MR);
}

// Outputs of MR pixels.
template <class V, int MR, int NB, Mode M, Way W> EK_INLINE void tile(const Finisher<V, M>& f, const Block& b, const Line& l, int first, bool silu) {
    using I = typename V::I;
    constexpr int P = NB == 1 ? 4 : NB == 2 ? 2 : 1;
    static_assert(MR % P == 0, "pixels of a vector");
    const float* const multiplier = b.multiplier;  // a copy: what is stored might change what is behind the pointer
    if constexpr (W == Way::kHalf) {
        I s[MR], halves[MR / 2];
        sum_half<V, MR>(b, l, first, s, halves);
        store_codes<V, MR, 2, M>(f, b, l, first, false, [&](const auto& codes, int m) __attribute__((always_inline)) {
            return V::order_halves(codes.of(V::scale(s[m], multiplier), V::scale(s[m + 1], multiplier),
                                            V::scale(halves[m / 2], multiplier + V::kLanes), V::set32(0)));
        });
    } else {
        I s[MR][NB];
        sum_by<V, MR, NB, W>(b, l, first, s);
        if constexpr (M == Mode::kReal) {
            if (W != Way::kAny && silu) store_reals<V>(b, l, first, s, [&](typename V::F x) __attribute__((always_inline)) { return silu_of<V>(x); });
            else store_reals<V>(b, l, first, s, [&](typename V::F x) __attribute__((always_inline)) { return x; });
            return;
        }
        const bool whole = b.count == NB * V::kLanes && NB != 3;
        store_codes<V, MR, P, M>(f, b, l, first, whole, [&](const auto& codes, int m) __attribute__((always_inline)) {
            I q[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int n = i % (4 / P);
                q[i] = n < NB ? V::scale(s[m + i / (4 / P)][n < NB ? n : 0], multiplier + n * V::kLanes) : V::set32(0);
            }
            const I packed = codes.of(q[0], q[1], q[2], q[3]);
            return NB == 4 ? packed : V::order(packed);  // in order already: lane_of()
        });
    }
}

// How a line is cut: so many tiles of MR pixels (the last may overlap the one before), the rest in tiles of four (the same).
struct Cut {
    int tiles, rest;
};

template <int MR> Cut cut(int pixels) {
    const int tiles = pixels / MR, rest = pixels % MR;
    if (MR == 7) {  // 7 + 1 = 2 * 4, 7 + 5 = 3 * 4, 14 + 2 = 4 * 4
        const int fewer = rest == 1 || rest == 5 ? 1 : rest == 2 ? 2 : 0;
        if (fewer <= tiles && rest != 6) return {tiles - fewer, rest + fewer * MR};
    }
    if (tiles && rest > MR - 4) return {tiles + 1, 0};
    return {tiles, rest};
}

template <class V, int MR, int NB, Mode M, Way W> void line(const Finish& f, const Block& b, const Line& l) {
    const Cut parts = cut<MR>(l.pixels);
    const Finisher<V, M> finisher(f);
    const bool silu = W != Way::kAny && f.real.act == Act::kSilu;  // of first layers, in registers; others while they lie near
    const auto finish = [&](const Line& at, int first, int pixels) {
        if (M != Mode::kReal || f.real.act == Act::kNone || silu) return;
        float* sums = reinterpret_cast<float*>(at.out + first * at.out_step);
        activate<V>(f.real, sums, at.out_step / 4, sums, at.out_step / 4, pixels, b.count);
    };
    for (int i = 0; i < parts.tiles; ++i) {
        const int first = least(i * MR, l.pixels - MR);
        tile<V, MR, NB, M, W>(finisher, b, l, first, silu);
        finish(l, first, MR);
    }
    Line low = l;
    const bool few = l.pixels < 4;  // than any tile has: one pixel at a time, as often as the tile is high
    if (few) low.in_step[0] = low.in_step[1] = low.out_step = low.residual_step = 0;
    for (int m = l.pixels - parts.rest; m < l.pixels; m += few ? 1 : 4) {
        if (few) {
            for (int i = 0; i < 2; ++i) low.in[i] = l.in[i] + m * l.in_step[i];
            low.out = l.out + m * l.out_step;
            low.residual = l.residual + m * l.residual_step;
        }
        const int first = few ? 0 : least(m, l.pixels - 4);
        tile<V, 4, NB, M, W>(finisher, b, low, first, silu);
        finish(low, first, few ? 1 : 4);
    }
}

using LineOf = void (*)(const Finish&, const Block&, const Line&);

template <class V, int NB, Way W = Way::kAny> LineOf line_of(Mode mode) {
    constexpr int MR = W == Way::kHalf ? 16 : V::template kPixels<NB>;
    switch (mode) {
        case Mode::kPlain: return line<V, MR, NB, Mode::kPlain, W>;
        case Mode::kTable: return line<V, MR, NB, Mode::kTable, W>;
        case Mode::kCurve: return line<V, MR, NB, Mode::kCurve, W>;
        case Mode::kReal: break;
    }
    if constexpr (W != Way::kHalf && W != Way::kRow3) return line<V, MR, NB, Mode::kReal, W>;  // see way_of()
    return nullptr;
}

template <class V> LineOf line_for(int width, Way way, Mode mode) {
    if constexpr (V::kRegisters == 32) {
        if (way == Way::kRow3) return line_of<V, 1, Way::kRow3>(mode);
        if (way == Way::kStem3) return line_of<V, 1, Way::kStem3>(mode);
        if (way == Way::kStem5) return line_of<V, 1, Way::kStem5>(mode);
        if (way == Way::kHalf) return line_of<V, 2, Way::kHalf>(mode);
        if (width == 4) return line_of<V, 4>(mode);
        if (width == 3) return line_of<V, 3>(mode);
    }
    return width == 2 ? line_of<V, 2>(mode) : line_of<V, 1>(mode);
}

}  // namespace
}  // namespace edgekit
