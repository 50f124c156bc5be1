// Functions of float32 vectors, for any set V: the operations of float_math.h in the same order.
// Included after the set's "#pragma GCC target", by one file each: nothing here is shared between sets.
#pragma once

#include "float_math.h"
#include "kernels.h"

#define EK_INLINE inline __attribute__((always_inline))

namespace edgekit {
namespace {

inline int least(int a, int b) { return a < b ? a : b; }
inline int most(int a, int b) { return a > b ? a : b; }
inline int up(int a, int to) { return (a + to - 1) / to * to; }
inline int over(int a, int by) { return (a + by - 1) / by; }

// The part of a window that lies inside of the picture: [first, first + count * dilation).
struct Inside {
    int first, count;
};

inline Inside inside(int at, int kernel, int dilation, int size) {
    int first = at, last = at + (kernel - 1) * dilation;
    if (first < 0) first += over(-first, dilation) * dilation;
    if (last >= size) last -= over(last - size + 1, dilation) * dilation;
    return {first, last < first ? 0 : (last - first) / dilation + 1};
}

// A function of float32 numbers and its parameters.
struct Activation {
    Act act = Act::kNone;
    float p0 = 0, p1 = 0;
};

inline Activation activation(const Step& s) { return {s.act, s.scalars[2], s.scalars[3]}; }

// e^x, or e^-x: 2^f, and in the low bits of `raise` the integer that it is still to be raised by.
template <class V> struct Power {
    typename V::F base, raise;
    EK_INLINE Power(typename V::F x, bool minus) {
        using F = typename V::F;
        const F log2e = V::setf(minus ? -kLog2e : kLog2e), rest = V::setf(minus ? -kLog2eRest : kLog2eRest), rounds = V::setf(kRounds);
        // the second one where they do not compare
        x = minus ? V::minf(V::setf(87.0f), x) : V::maxf(V::setf(-87.0f), x);
        x = minus ? V::maxf(V::setf(-88.0f), x) : V::minf(V::setf(88.0f), x);
        raise = V::fma(x, log2e, rounds);
        const F f = V::fma(x, rest, V::fma(x, log2e, V::subf(rounds, raise)));
        F p = V::setf(kPower[0]);
#pragma GCC unroll 4
        for (int i = 1; i < 5; ++i) p = V::fma(p, f, V::setf(kPower[i]));
        base = V::fma(p, f, V::setf(1.0f));
    }
};

template <class V> EK_INLINE typename V::F exp_of(typename V::F x) {
    const Power<V> p(x, false);
    return V::mulf(p.base, V::raised(V::setf(1.0f), p.raise));
}

// x / (1 + e^-x). A NaN is one whatever it is divided by, so that the exponent can be added as it is.
template <class V> EK_INLINE typename V::F silu_of(typename V::F x) {
    const Power<V> p(x, true);
    return V::divf(x, V::addf(V::setf(1.0f), V::raised(p.base, p.raise)));
}

template <class V> EK_INLINE typename V::F sigmoid_of(typename V::F x) {
    return V::divf(V::setf(1.0f), V::addf(V::setf(1.0f), exp_of<V>(V::negf(x))));
}

template <class V> EK_INLINE typename V::F erf_of(typename V::F x) {
    using F = typename V::F;
    const F a = V::pick_negative(x, V::negf(x), x), one = V::setf(1.0f);
    const F t = V::divf(one, V::fma(V::setf(0.3275911f), a, one));
    F p = V::setf(1.061405429f);
    p = V::fma(p, t, V::setf(-1.453152027f));
    p = V::fma(p, t, V::setf(1.421413741f));
    p = V::fma(p, t, V::setf(-0.284496736f));
    p = V::fma(p, t, V::setf(0.254829592f));
    const F y = V::subf(one, V::mulf(V::mulf(p, t), exp_of<V>(V::negf(V::mulf(a, a)))));
    return V::pick_negative(x, V::negf(y), y);
}

template <class V> EK_INLINE typename V::F activation_of(Act act, typename V::F a, typename V::F p0, typename V::F p1) {
    const typename V::F none = V::setf(0.0f), one = V::setf(1.0f);
    switch (act) {
        case Act::kRelu: return V::maxf(a, none);
        case Act::kClip: return V::minf(V::maxf(a, p0), p1);
        case Act::kLeakyRelu: return V::pick_positive(a, a, V::mulf(a, p0));
        case Act::kSigmoid: return sigmoid_of<V>(a);
        case Act::kSilu: return silu_of<V>(a);
        case Act::kHardSwish:
            return V::mulf(V::mulf(a, V::minf(V::maxf(V::addf(a, V::setf(3.0f)), none), V::setf(6.0f))), V::setf(1.0f / 6.0f));
        case Act::kHardSigmoid: return V::minf(V::maxf(V::addf(V::mulf(a, p0), p1), none), one);
        case Act::kTanh: return V::subf(one, V::divf(V::setf(2.0f), V::addf(exp_of<V>(V::addf(a, a)), one)));
        case Act::kGelu:
            return V::mulf(V::mulf(V::setf(0.5f), a), V::addf(one, erf_of<V>(V::mulf(a, V::setf(0.70710678f)))));
        case Act::kExp: return exp_of<V>(a);
        default: return a;
    }
}

// Calls each(function): the activation, chosen once for all that `each` does with it.
template <class V, class Each> EK_INLINE void with_activation(const Activation& a, Each each) {
    using F = typename V::F;
    const F p0 = V::setf(a.p0), p1 = V::setf(a.p1);
#define EK_CASE(name) \
    case Act::name: return each([&](F x) __attribute__((always_inline)) { return activation_of<V>(Act::name, x, p0, p1); })
    switch (a.act) {
        EK_CASE(kNone);
        EK_CASE(kRelu);
        EK_CASE(kClip);
        EK_CASE(kLeakyRelu);
        EK_CASE(kSigmoid);
        EK_CASE(kSilu);
        EK_CASE(kHardSwish);
        EK_CASE(kHardSigmoid);
        EK_CASE(kTanh);
        EK_CASE(kGelu);
        EK_CASE(kExp);
        default: break;
    }
#undef EK_CASE
}

// to = act(from) for `runs` runs of `count` floats, which may lie at the same place.
template <class V>
__attribute__((noinline)) void activate(const Activation& a, const float* from, ptrdiff_t from_step, float* to, ptrdiff_t to_step, int runs, int count) {
    if (from_step == count && to_step == count) count *= runs, runs = 1;
    with_activation<V>(a, [&](auto function) __attribute__((always_inline)) {
        for (int i = 0; i < runs; ++i, from += from_step, to += to_step) {
            int k = 0;
            for (; k + V::kLanes <= count; k += V::kLanes) V::storef(to + k, function(V::loadf(from + k)));
            if (k < count) V::storef(to + k, function(V::loadf(from + k, count - k)), count - k);
        }
    });
}

// to = sat8u(rne(from * scale) + zero), held below 2^30; NaN gives the zero point.
template <class V>
__attribute__((noinline)) void quantize(float scale, int zero, const float* from, ptrdiff_t from_step, uint8_t* to, ptrdiff_t to_step, int runs, int count) {
    const typename V::F by = V::setf(scale);
    const auto shift = V::set16(zero);
    if (from_step == count && to_step == count) count *= runs, runs = 1;
    for (int i = 0; i < runs; ++i, from += from_step, to += to_step)
        for (int k = 0; k < count; k += V::kBytes) {
            typename V::I v[4];
            const float* at = from + k;
            const int left = count - k;
            if (left >= V::kBytes) {
                for (int j = 0; j < 4; ++j) v[j] = V::held_rne(V::mulf(V::loadf(at + j * V::kLanes), by));
            } else {
                for (int j = 0; j < 4; ++j) v[j] = V::held_rne(V::mulf(V::loadf(at + j * V::kLanes, left - j * V::kLanes), by));
            }
            const auto codes = V::bytes(V::add16(V::words(v[0], v[1]), shift), V::add16(V::words(v[2], v[3]), shift));
            V::template scatter<1>(to + k, 0, V::order(codes), count - k);
        }
}

}  // namespace
}  // namespace edgekit
