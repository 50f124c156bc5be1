// Overlap of rotated boxes, several pairs at a time; reference.py states the rule, operation by operation.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace edgekit::boxes3d {

constexpr double kMaxYaw = 1e6;

// What pairs need of a box. Unusable ones have radius NaN, so they are near nothing.
struct Box {
    double x = 0, y = 0, c = 1, s = 0, half_l = 0, half_w = 0;
    double radius = std::numeric_limits<double>::quiet_NaN();
    double area = 0, z = 0, h = 0;
    bool usable() const { return radius == radius; }
};

inline void sincos(double angle, double& sine, double& cosine) {
    constexpr double f(1), f3 = f * 2 * 3, f5 = f3 * 4 * 5, f7 = f5 * 6 * 7, f9 = f7 * 8 * 9, f11 = f9 * 10 * 11,
                         f13 = f11 * 12 * 13, f15 = f13 * 14 * 15, f17 = f15 * 16 * 17;
    constexpr double f2(2), f4 = f2 * 3 * 4, f6 = f4 * 5 * 6, f8 = f6 * 7 * 8, f10 = f8 * 9 * 10, f12 = f10 * 11 * 12,
                         f14 = f12 * 13 * 14, f16 = f14 * 15 * 16;
    constexpr double kSine[] = {1 / f17, -1 / f15, 1 / f13, -1 / f11, 1 / f9, -1 / f7, 1 / f5, -1 / f3, 1};
    constexpr double kCosine[] = {1 / f16, -1 / f14, 1 / f12, -1 / f10, 1 / f8, -1 / f6, 1 / f4, -1 / f2, 1};
    const double n = std::nearbyint(angle * 0.6366197723675814);
    const double r = (angle - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11;
    const double t = r * r;
    double p = kSine[0], q = kCosine[0];
    for (int i = 1; i < 9; i++) p = p * t + kSine[i], q = q * t + kCosine[i];
    p = p * r;
    const int quadrant = int(int64_t(n) & 3);
    if (quadrant & 1) std::swap(p, q);
    sine = quadrant >= 2 ? -p : p;
    cosine = quadrant == 1 || quadrant == 2 ? -q : q;
}

inline Box prepare(const float* v) {
    for (int i = 0; i < 7; i++)
        if (!std::isfinite(v[i])) return Box{};
    if (!(std::fabs(v[6]) <= float(kMaxYaw))) return Box{};
    const double l = v[3] > 0 ? v[3] : 0, w = v[4] > 0 ? v[4] : 0;
    Box b;
    b.x = v[0], b.y = v[1], b.z = v[2], b.h = v[5] > 0 ? v[5] : 0;
    sincos(v[6], b.s, b.c);
    b.half_l = 0.5 * l, b.half_w = 0.5 * w;
    b.radius = std::sqrt(b.half_l * b.half_l + b.half_w * b.half_w);
    b.area = l * w;
    return b;
}

// Four boxes side by side; lanes not used stay unusable.
struct Block {
    static constexpr int kLanes = 4;
    double x[4] = {}, y[4] = {}, c[4] = {1, 1, 1, 1}, s[4] = {}, half_l[4] = {}, half_w[4] = {};
    double radius[4], area[4] = {}, z[4] = {}, h[4] = {};

    Block() { std::fill_n(radius, 4, std::numeric_limits<double>::quiet_NaN()); }
    void set(int i, const Box& b) {
        x[i] = b.x, y[i] = b.y, c[i] = b.c, s[i] = b.s, half_l[i] = b.half_l, half_w[i] = b.half_w;
        radius[i] = b.radius, area[i] = b.area, z[i] = b.z, h[i] = b.h;
    }
};

template <class M>
EDGEKIT_INLINE bool any_lane(const M& mask) {
    uint64_t parts[sizeof(M) / 8], all = 0;
    std::memcpy(parts, &mask, sizeof mask);
    for (const uint64_t part : parts) all |= part;
    return all != 0;
}

template <class D>
EDGEKIT_INLINE D clamp(const D& v, const D& limit) {
    const D low = v < -limit ? -limit : v;
    return low > limit ? limit : low;
}

template <class D>
EDGEKIT_INLINE D share(const D& v) {
    const D zero{}, one = zero + 1.0, low = v > zero ? v : zero;
    return low < one ? low : one;
}

template <class D>
EDGEKIT_INLINE D inverse(const D& v) {
    const D zero{}, one = zero + 1.0;
    return v != zero ? one / v : zero;
}

// The boxes of lanes i.. of a block, or one box in all lanes.
template <class D>
struct Boxes {
    D x, y, c, s, half_l, half_w, radius, area, z, h;

    EDGEKIT_INLINE static Boxes at(const Block& b, int i) {
        return {load<D>(b.x + i),      load<D>(b.y + i),      load<D>(b.c + i),    load<D>(b.s + i), load<D>(b.half_l + i),
                load<D>(b.half_w + i), load<D>(b.radius + i), load<D>(b.area + i), load<D>(b.z + i), load<D>(b.h + i)};
    }
    EDGEKIT_INLINE static Boxes all(const Box& b) {
        const D zero{};
        return {zero + b.x,      zero + b.y,      zero + b.c,    zero + b.s, zero + b.half_l,
                zero + b.half_w, zero + b.radius, zero + b.area, zero + b.z, zero + b.h};
    }
};

template <class D>
EDGEKIT_INLINE auto near(const Boxes<D>& a, const Boxes<D>& b) {
    const D dx = b.x - a.x, dy = b.y - a.y, reach = a.radius + b.radius;
    return dx * dx + dy * dy < reach * reach;
}

template <class D>
EDGEKIT_INLINE D edge(const D& x0, const D& y0, const D& y1, const D& step, const D& inverse_y, const D& limit_x,
                      const D& limit_y) {
    const D zero{};
    const D ya = clamp(y0, limit_y), yb = clamp(y1, limit_y);
    const D xa = x0 + share<D>((ya - y0) * inverse_y) * step;
    const D xb = x0 + share<D>((yb - y0) * inverse_y) * step;
    const D ca = clamp(xa, limit_x), cb = clamp(xb, limit_x);
    const D cut = (ca - xa) - (xb - cb), way = xb - xa;
    const D part = way != zero ? cut / way : zero;
    return (yb - ya) * ((ca + cb) + part * (ca - cb));
}

// Area shared from above, of pairs that are near.
template <class D>
EDGEKIT_INLINE D intersection(const Boxes<D>& a, const Boxes<D>& b) {
    auto swap = b.s < a.s;
    swap = (b.c < a.c) | ((b.c == a.c) & swap);
    swap = (b.half_l < a.half_l) | ((b.half_l == a.half_l) & swap);
    swap = (b.y < a.y) | ((b.y == a.y) & swap);
    swap = (b.x < a.x) | ((b.x == a.x) & swap);
    swap = (b.area < a.area) | ((b.area == a.area) & swap);
    const D pc = swap ? b.c : a.c, ps = swap ? b.s : a.s, qc = swap ? a.c : b.c, qs = swap ? a.s : b.s;
    const D limit_x = swap ? b.half_l : a.half_l, limit_y = swap ? b.half_w : a.half_w;
    const D ql = swap ? a.half_l : b.half_l, qw = swap ? a.half_w : b.half_w;
    const D dx = swap ? a.x - b.x : b.x - a.x, dy = swap ? a.y - b.y : b.y - a.y;
    const D ox = pc * dx + ps * dy, oy = pc * dy - ps * dx;
    const D c = pc * qc + ps * qs, s = pc * qs - ps * qc;
    const D ux = ql * c, uy = ql * s, vx = qw * s, vy = qw * c;
    const D x0 = (ox + ux) - vx, x1 = (ox - ux) - vx, x2 = (ox - ux) + vx, x3 = (ox + ux) + vx;
    const D y0 = (oy + uy) + vy, y1 = (oy - uy) + vy, y2 = (oy - uy) - vy, y3 = (oy + uy) - vy;
    const D iu = inverse<D>(2.0 * uy), iv = inverse<D>(2.0 * vy);
    D total = edge<D>(x0, y0, y1, -2.0 * ux, -iu, limit_x, limit_y);
    total = total + edge<D>(x1, y1, y2, 2.0 * vx, -iv, limit_x, limit_y);
    total = total + edge<D>(x2, y2, y3, 2.0 * ux, iu, limit_x, limit_y);
    total = total + edge<D>(x3, y3, y0, -2.0 * vx, iv, limit_x, limit_y);
    total = 0.5 * total;
    const D zero{}, most = a.area < b.area ? a.area : b.area;
    total = total > zero ? total : zero;
    return total < most ? total : most;
}

template <class D>
EDGEKIT_INLINE D shared_height(const Boxes<D>& a, const Boxes<D>& b) {
    const D top_a = a.z + 0.5 * a.h, top_b = b.z + 0.5 * b.h, low_a = a.z - 0.5 * a.h, low_b = b.z - 0.5 * b.h;
    const D zero{}, most = a.h < b.h ? a.h : b.h;
    D shared = (top_a < top_b ? top_a : top_b) - (low_a > low_b ? low_a : low_b);
    shared = shared > zero ? shared : zero;
    return shared < most ? shared : most;
}

// IoU of one box with `count` boxes in blocks.
template <int B>
EDGEKIT_INLINE void row(const Box& box, const Block* blocks, int count, bool three_d, float* out) {
    using D = typename V<B>::D;
    const D zero{};
    const Boxes<D> a = Boxes<D>::all(box);
    for (int j = 0; j < count; j += V<B>::kDoubles) {
        const Boxes<D> b = Boxes<D>::at(blocks[j / Block::kLanes], j % Block::kLanes);
        const auto close = near(a, b);
        const int lanes = std::min(V<B>::kDoubles, count - j);
        if (!any_lane(close)) {
            for (int k = 0; k < lanes; k++) out[j + k] = 0;
            continue;
        }
        D shared = intersection(a, b), sizes_a = a.area, sizes_b = b.area;
        if (three_d) shared = shared * shared_height(a, b), sizes_a = sizes_a * a.h, sizes_b = sizes_b * b.h;
        const D whole = (sizes_a + sizes_b) - shared;
        const D iou = close & (whole > zero) ? shared / whole : zero;
        double values[V<B>::kDoubles];
        store(values, iou);
        for (int k = 0; k < lanes; k++) out[j + k] = float(values[k]);
    }
}

EDGEKIT_LANES(void, row, (const Box& box, const Block* blocks, int count, bool three_d, float* out),
              (box, blocks, count, three_d, out))

// Whether one of the block's boxes overlaps `box` by more than `limit`.
template <int B>
EDGEKIT_INLINE bool suppressed(const Block& block, const Box& box, double limit) {
    using D = typename V<B>::D;
    const Boxes<D> a = Boxes<D>::all(box);
    for (int i = 0; i < Block::kLanes; i += V<B>::kDoubles) {
        const Boxes<D> b = Boxes<D>::at(block, i);
        const auto close = near(a, b);
        if (!any_lane(close)) continue;
        const D shared = intersection(a, b);
        if (any_lane(close & (shared > limit * ((a.area + b.area) - shared)))) return true;
    }
    return false;
}

EDGEKIT_LANES(bool, suppressed, (const Block& block, const Box& box, double limit), (block, box, limit))

// Whether the centre of one of the block's boxes lies within `limit` of that of `box`.
template <int B>
EDGEKIT_INLINE bool within(const Block& block, const Box& box, double limit) {
    using D = typename V<B>::D;
    const D zero{}, most = zero + limit * limit;
    for (int i = 0; i < Block::kLanes; i += V<B>::kDoubles) {
        const Boxes<D> b = Boxes<D>::at(block, i);
        const D dx = b.x - box.x, dy = b.y - box.y;
        if (any_lane((dx * dx + dy * dy <= most) & (b.radius == b.radius))) return true;
    }
    return false;
}

EDGEKIT_LANES(bool, within, (const Block& block, const Box& box, double limit), (block, box, limit))

}  // namespace edgekit::boxes3d
