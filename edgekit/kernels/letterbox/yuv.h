// YUV, bilinear: planes of bytes are resampled into 16-bit rows with 7 fractional bits, blended vertically
// and converted, in 16-bit arithmetic throughout (reference.py). m(a, b) is pmulhrsw and sqrdmulh.
#pragma once

#include "finish.h"

#include <algorithm>

namespace edgekit {
namespace {

inline int m(int a, int b) { return (a * b + (1 << 14)) >> 15; }

inline uint8_t to_level(int sum) {
    sum = std::min(std::max(sum, -32768), 32767) >> 6;
    return uint8_t(std::min(std::max(sum, 0), 255));
}

// YUV to B, G, R as in reference.py: Tables.color.
struct Color {
    int16_t black, luma, u_blue, u_green, v_green, v_red;
};

// Columns of one plane: output pixel x takes bytes first[x] and second[x]. All three are filled up to a
// multiple of 32, so that vectors need no remainder. `mask` picks both bytes of 8 output pixels out of
// `chunks` times 16 bytes from base[x / 8] on; chunks 0: too far apart, or the row too short.
struct Columns {
    static constexpr int MOST_CHUNKS = 4;
    int n = 0;
    int chunks = 0;
    std::vector<int32_t> first, second, base;
    std::vector<int16_t> weight;
    std::vector<uint8_t> mask;

    void add(int a, int b, int w) {
        first.push_back(a);
        second.push_back(b);
        weight.push_back(int16_t(w));
    }

    // After the last `add`; `row_bytes`: what may be read of a row.
    void finish(int row_bytes) {
        n = int(first.size());
        while (first.size() % 32) add(first.back(), second.back(), weight.back());
        const int groups = int(first.size()) / 8;
        for (int g = 0; g < groups; g++) {
            const int span = second[8 * g + 7] - first[8 * g] + 1;
            chunks = std::max(chunks, (span + 15) / 16);
        }
        if (chunks > MOST_CHUNKS || row_bytes < 16 * chunks) chunks = 0;
        mask.resize(size_t(groups) * chunks * 16, 0x80);  // 0x80 and above: zero, for SSE and NEON alike
        for (int g = 0; g < groups; g++) {
            base.push_back(chunks ? std::min(first[8 * g], row_bytes - 16 * chunks) : 0);
            for (int i = 0; chunks && i < 16; i++) {
                const int x = 8 * g + i / 2, byte = (i % 2 ? second[x] : first[x]) - base[g];
                mask_at(g, byte / 16, i) = uint8_t(mask_of(byte));
            }
        }
    }

private:
    // x86 shuffles each chunk by itself, two groups side by side: [group / 2][chunk][group % 2][16].
    // ARM looks all chunks up at once: [group][16].
    uint8_t& mask_at(int group, int chunk, int i) {
#if EDGEKIT_HAS_NEON
        return mask[size_t(group) * 16 + i + 0 * chunk];
#else
        return mask[((size_t(group / 2) * chunks + chunk) * 2 + group % 2) * 16 + i];
#endif
    }
    static int mask_of(int byte) {
#if EDGEKIT_HAS_NEON
        return byte;
#else
        return byte % 16;
#endif
    }
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

inline void resample(const Columns& c, const uint8_t* row, int16_t* dst) {
    for (int x = 0; x < c.n; x++) {
        const int a = row[c.first[x]] * 128, b = row[c.second[x]] * 128;
        dst[x] = int16_t(a + m(b - a, c.weight[x]));
    }
}

// Two rows of each plane, resampled, and the weight of the second.
struct Rows {
    const int16_t *y[2], *u[2], *v[2];
    int16_t weight;
};

struct Planes {
    uint8_t *blue, *green, *red;
};

// y: minus black; u, v: minus their middle, doubled.
inline void store_pixel(int y, int u, int v, const Color& c, const Planes& to, int x) {
    y = m(y, c.luma) + 32;
    to.blue[x] = to_level(y + m(u, c.u_blue));
    to.green[x] = to_level(y + m(u, c.u_green) + m(v, c.v_green));
    to.red[x] = to_level(y + m(v, c.v_red));
}

inline void convert(const Rows& r, const Color& c, int n, const Planes& to) {
    const int w = r.weight;
    for (int x = 0; x < n; x++) {
        const int y = r.y[0][x] + m(r.y[1][x] - r.y[0][x], w), u = r.u[0][x] + m(r.u[1][x] - r.u[0][x], w);
        const int v = r.v[0][x] + m(r.v[1][x] - r.v[0][x], w);
        store_pixel(y - c.black, 2 * (u - (1 << 14)), 2 * (v - (1 << 14)), c, to, x);
    }
}

// Half the size both ways: the taps' weights are all 1/2 and the arithmetic above gives the exact mean of
// four luma bytes, which needs no intermediate rows. `row`: two rows of a packed picture, from pixel 2 x on.
inline void halve_packed(const uint8_t* const row[2], int luma, const Color& c, int from, int n, const Planes& to) {
    for (int x = from; x < n; x++) {
        const uint8_t *a = row[0] + 4 * x, *b = row[1] + 4 * x;
        const int y = (a[luma] + a[luma + 2] + b[luma] + b[luma + 2]) * 32;
        const int u = (a[1 - luma] + b[1 - luma]) * 64, v = (a[3 - luma] + b[3 - luma]) * 64;
        store_pixel(y - c.black, 2 * (u - (1 << 14)), 2 * (v - (1 << 14)), c, to, x);
    }
}

// The same with planes: chroma, `step` bytes apart, is that of the output pixel.
inline void halve_planes(const uint8_t* const row[2], const uint8_t* u_row, const uint8_t* v_row, int step,
                         const Color& c, int from, int n, const Planes& to) {
    for (int x = from; x < n; x++) {
        const uint8_t *a = row[0] + 2 * x, *b = row[1] + 2 * x;
        const int u = u_row[x * step] * 128, v = v_row[x * step] * 128;
        store_pixel((a[0] + a[1] + b[0] + b[1]) * 32 - c.black, 2 * (u - (1 << 14)), 2 * (v - (1 << 14)), c, to, x);
    }
}

}  // namespace
}  // namespace edgekit
