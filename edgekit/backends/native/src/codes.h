// From sums to codes, the same for every x86 instruction set: V is the vectors of one (avx512.cpp, avx2.h).
// Included after the set's "#pragma GCC target", by one file each: nothing here is shared between sets.
#pragma once

#include "functions.h"

namespace edgekit {
namespace {

// A table that changes nothing.
struct Same {
    alignas(64) uint8_t codes[256];
    constexpr Same() : codes() {
        for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
    }
};
constexpr Same kSame;

enum class Mode { kPlain, kTable, kCurve, kReal };  // what becomes of a sum

// Two codes and what they weigh: sat8u(rne(float(a - za) * sa + float(b - zb) * sb) + zero), then a table.
struct Blend {
    int za = 0, zb = 0, zero = 0;
    float sa = 0, sb = 0;
    const uint8_t* table = nullptr;
};

struct Finish {
    Mode mode = Mode::kPlain;
    Activation real;                 // of sums that stay real numbers
    int zero = 0;                    // of the code before the table; the curve's shift
    const uint8_t* table = nullptr;  // 256 bytes
    const int16_t* curve = nullptr;  // base[64], slope[64] for V::bend()
    bool residual = false;
    Blend blend;
};

// Makes Finish out of a convolution's Step. false: numbers that these kernels do not take.
inline bool finish_of(const Step& s, Store& store, Finish& f) {
    f.residual = s.in[1].c != 0;
    f.zero = f.residual ? s.ints[1] : s.out[0].zero;
    f.mode = s.out[0].dtype == Dtype::kF32 ? Mode::kReal : Mode::kPlain;
    if (f.mode == Mode::kReal) f.real = activation(s);
    if (s.act == Act::kTable) {
        f.mode = Mode::kTable;
        f.zero = s.ints[0];
        f.table = s.constants[3];
    }
    if (s.act == Act::kCurve) {
        f.mode = Mode::kCurve;
        f.zero = s.ints[0];
        const int16_t* given = reinterpret_cast<const int16_t*>(s.constants[3]);
        int16_t* curve = reinterpret_cast<int16_t*>(store.bytes(256));
        for (int i = 0; i < 64; ++i) {
            // base + 32, which rounds; V::bend() leaves a bit of i on top of f: slope * (f - 2^15) is slope less
            const int base = given[i] + 32 + (i & 1) * given[64 + i];
            if (base < -32768 || base > 32767 || given[i] > 32767 - 32 || given[64 + i] == -32768) return false;
            curve[i] = static_cast<int16_t>(base);
            curve[64 + i] = given[64 + i];
        }
        f.curve = curve;
    }
    if (f.residual) f.blend = {s.ints[1], s.in[1].zero, s.out[0].zero, s.scalars[0], s.scalars[1], s.constants[4]};
    return true;
}

// The numbers of a Finish as vectors.
template <class V, Mode M> struct Codes {
    using I = typename V::I;
    typename V::Table table;
    typename V::Curve curve;
    I zero;

    EK_INLINE explicit Codes(const Finish& f) {
        zero = V::set16(f.zero);
        if (M == Mode::kTable) table = V::table(f.table);
        if (M == Mode::kCurve) curve = V::curve(f.curve);
    }

    // Four vectors of scaled sums -> one of codes, as the packing instructions leave them (V::order puts them in order).
    EK_INLINE I of(I a, I b, I c, I d) const {
        I low = V::words(a, b), high = V::words(c, d);
        if (M == Mode::kCurve) return V::bytes(V::bend(curve, low, zero), V::bend(curve, high, zero));
        return V::bytes(V::add16(low, zero), V::add16(high, zero));
    }
    EK_INLINE I look(I codes) const { return M == Mode::kTable ? V::look(table, codes) : codes; }
};

// The same where the mode is only known when it runs: for kernels that are compiled in many shapes.
template <class V> struct AnyCodes {
    using I = typename V::I;
    typename V::Table table;
    typename V::Curve curve;
    I zero;
    Mode mode;

    EK_INLINE explicit AnyCodes(const Finish& f)
        : table(V::table(f.table ? f.table : kSame.codes)), zero(V::set16(f.zero)), mode(f.mode) {
        if (mode == Mode::kCurve) curve = V::curve(f.curve);
    }
    EK_INLINE I of(I a, I b, I c, I d) const {
        I low = V::words(a, b), high = V::words(c, d);
        if (mode == Mode::kCurve) return V::bytes(V::bend(curve, low, zero), V::bend(curve, high, zero));
        const I codes = V::bytes(V::add16(low, zero), V::add16(high, zero));
        return mode == Mode::kTable ? V::look(table, codes) : codes;
    }
};

// The four vectors of float(code - zero) of a vector of codes, in the order that packing undoes.
template <class V> struct Reals {
    typename V::F part[4];
    EK_INLINE Reals(typename V::I codes, typename V::F offset) {  // offset: Reals::offset(zero)
        // a code below the bits of 2^23 is the float 2^23 + code
        const typename V::I o = V::set32(0), bits = V::set16(0x4b00);
        const typename V::I low = V::low8(codes, o), high = V::high8(codes, o);
        part[0] = V::subf(V::bare(V::low16(low, bits)), offset), part[1] = V::subf(V::bare(V::high16(low, bits)), offset);
        part[2] = V::subf(V::bare(V::low16(high, bits)), offset), part[3] = V::subf(V::bare(V::high16(high, bits)), offset);
    }
    static EK_INLINE typename V::F offset(int zero) { return V::setf(8388608.0f + static_cast<float>(zero)); }
};

template <class V> EK_INLINE typename V::I codes_of(typename V::F a, typename V::F b, typename V::F c, typename V::F d, typename V::I zero) {
    return V::bytes(V::add16(V::words(V::rne(a), V::rne(b)), zero), V::add16(V::words(V::rne(c), V::rne(d)), zero));
}

template <class V> struct Blender {
    using I = typename V::I;
    using F = typename V::F;
    I zero;
    F za, zb, sa, sb;
    typename V::Table table;
    bool looks;

    EK_INLINE explicit Blender(const Blend& b)
        : zero(V::set16(b.zero)), za(Reals<V>::offset(b.za)), zb(Reals<V>::offset(b.zb)), sa(V::setf(b.sa)), sb(V::setf(b.sb)),
          looks(b.table != nullptr) {
        if (looks) table = V::table(b.table);
    }
    EK_INLINE F part(F a, F b) const { return V::addf(V::mulf(a, sa), V::mulf(b, sb)); }
    EK_INLINE I of(I a, I b) const {  // codes in any order, the same for both
        const Reals<V> x(a, za), y(b, zb);
        const I codes = codes_of<V>(part(x.part[0], y.part[0]), part(x.part[1], y.part[1]), part(x.part[2], y.part[2]),
                                    part(x.part[3], y.part[3]), zero);
        return looks ? V::look(table, codes) : codes;
    }
};

}  // namespace
}  // namespace edgekit
