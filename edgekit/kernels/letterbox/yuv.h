// YUV, bilinear: planes of bytes are resampled into 16-bit rows with 7 fractional bits, blended vertically
// and converted, in 16-bit arithmetic throughout (reference.py). m(a, b) is pmulhrsw and sqrdmulh.
#pragma once

#include "letterbox/finish.h"

#include <algorithm>

namespace edgekit {
namespace {

inline int m(int a, int b) { return (a * b + (1 << 14)) >> 15; }

inline int16_t saturate(int a) { return int16_t(std::min(std::max(a, -32768), 32767)); }

// Columns of one plane: output pixel x takes bytes first[x] and second[x].
struct Columns {
    int n;
    std::vector<int32_t> first, second;
    std::vector<int16_t> weight;
};

// YUV to B, G, R as in reference.py: Tables.color.
struct Color {
    int16_t black, luma, u_blue, u_green, v_green, v_red;
};

// Bytes of a packed row apart: `pairs` of Y U Y V (luma = 0) or U Y V Y (luma = 1).
inline void unpack_packed(const uint8_t* row, int luma, int from, int pairs, uint8_t* y, uint8_t* u, uint8_t* v) {
    for (int i = from; i < pairs; i++) {
        y[2 * i] = row[4 * i + luma];
        y[2 * i + 1] = row[4 * i + 2 + luma];
        u[i] = row[4 * i + 1 - luma];
        v[i] = row[4 * i + 3 - luma];
    }
}

// Bytes of an interleaved chroma row apart.
inline void unpack_pairs(const uint8_t* row, int from, int pairs, uint8_t* u, uint8_t* v) {
    for (int i = from; i < pairs; i++) {
        u[i] = row[2 * i];
        v[i] = row[2 * i + 1];
    }
}

inline void resample(const Columns& c, const uint8_t* row, int from, int16_t* dst) {
    for (int x = from; x < c.n; x++) {
        const int a = row[c.first[x]] * 128, b = row[c.second[x]] * 128;
        dst[x] = int16_t(a + m(b - a, c.weight[x]));
    }
}

// Two rows of each plane, resampled, and the weight of the second.
struct Rows {
    const int16_t *y[2], *u[2], *v[2];
    int16_t weight;
};

// n output pixels into planes of B, G and R.
inline void convert(const Rows& r, const Color& c, int from, int n, uint8_t* blue, uint8_t* green, uint8_t* red) {
    const int w = r.weight;
    const auto clamp = [](int level) { return uint8_t(std::min(std::max(saturate(level) >> 6, 0), 255)); };
    for (int x = from; x < n; x++) {
        const int y = m(r.y[0][x] + m(r.y[1][x] - r.y[0][x], w) - c.black, c.luma) + 32;
        const int u = 2 * (r.u[0][x] + m(r.u[1][x] - r.u[0][x], w) - (1 << 14));
        const int v = 2 * (r.v[0][x] + m(r.v[1][x] - r.v[0][x], w) - (1 << 14));
        blue[x] = clamp(y + m(u, c.u_blue));
        green[x] = clamp(y + m(u, c.u_green) + m(v, c.v_green));
        red[x] = clamp(y + m(v, c.v_red));
    }
}

}  // namespace
}  // namespace edgekit
