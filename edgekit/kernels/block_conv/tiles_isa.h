// The inner loops, once per instruction set (so no include guard): tiles.h includes this with
//   LANES  the namespace          TARGET  the function attribute of the instruction set
//   F, I   vectors of kWidth floats and of kWidth int32
//   LOAD_F STORE_F SET_F FMA(a, b, c) MAX_F     LOAD_I STORE_I SET_I and DOT(c, x, w): c += the four products of x, w
//   SET_W  four int8 weights, broadcast
// A tile is R filters by P vectors of pixels, whose sums stay in registers while the kept weights stream by. Every
// sum runs over them in rising order, whatever R, P and the width are.

namespace LANES {

// kRows: filters that share a list of kept weights. Those of a block are done R at a time.
template <int R, int P, int kRows>
TARGET inline void sums(const Run& run, const float* w, const float* bias, bool relu, float* const* out, int rows) {
    F c[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) c[r][p] = SET_F(bias[r]);
    const float* x[P];
    for (int p = 0; p < P; p++) x[p] = reinterpret_cast<const float*>(run.x) + run.at[p];
    const int32_t* const end = run.offsets + run.count;
    for (const int32_t* o = run.offsets; o < end; o++, w += kRows) {
        F v[P];
        for (int p = 0; p < P; p++) v[p] = LOAD_F(x[p] + *o);
        for (int r = 0; r < R; r++) {
            const F weight = SET_F(w[r]);
            for (int p = 0; p < P; p++) c[r][p] = FMA(weight, v[p], c[r][p]);
        }
    }
    const F zero = SET_F(0.0f);
    for (int r = 0; r < R && r < rows; r++)
        for (int p = 0; p < P; p++) STORE_F(out[r] + run.at[p], relu ? MAX_F(zero, c[r][p]) : c[r][p]);
}

template <int R, int P, int kRows>
TARGET inline void sums(const Run& run, const int8_t* w, const int32_t* bias, int32_t* out) {
    I c[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) c[r][p] = SET_I(bias[r]);
    const uint32_t* x[P];
    for (int p = 0; p < P; p++) x[p] = run.x + run.at[p];
    const int32_t* const end = run.offsets + run.count;
    for (const int32_t* o = run.offsets; o < end; o++, w += kRows * 4) {
        I v[P];
        for (int p = 0; p < P; p++) v[p] = LOAD_I(x[p] + *o);
        for (int r = 0; r < R; r++) {
            const I weight = SET_W(w + r * 4);
            for (int p = 0; p < P; p++) c[r][p] = DOT(c[r][p], v[p], weight);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) STORE_I(out + (r * P + p) * kWidth, c[r][p]);
}

template <int P, int kRows>
TARGET inline void floats_of(const Run& run, const FloatEnd& end) {
    constexpr int R = kRows == 1 ? 1 : kFilters;
    const float* w = static_cast<const float*>(run.w);
    for (int r = 0; r < kRows && r < run.rows; r += R)
        sums<R, P, kRows>(run, w + r, end.bias + r, end.relu, end.out + r, run.rows - r);
}

template <int P, int kRows>
TARGET inline void bytes_of(const Run& run, const ByteEnd& end) {
    constexpr int R = kFilters;
    const int8_t* w = static_cast<const int8_t*>(run.w);
    alignas(64) int32_t found[R * P * kWidth];
    for (int from = 0; from < kRows && from < run.rows; from += R) {
        sums<R, P, kRows>(run, w + from * 4, end.bias + from, found);
        for (int r = 0; r < R && from + r < run.rows; r++) {
            const float scale = end.scale[from + r], low = end.low, high = end.high;
            const int32_t zero = end.zero;
            constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: no fraction fits beside it: rounded to even
            float y[P * kWidth];
            uint8_t codes[P * kWidth];
            for (int i = 0; i < P * kWidth; i++) y[i] = float(found[r * P * kWidth + i]) * scale;
            for (int i = 0; i < P * kWidth; i++) y[i] = y[i] > low ? y[i] : low;
            for (int i = 0; i < P * kWidth; i++) y[i] = y[i] < high ? y[i] : high;
            for (int i = 0; i < P * kWidth; i++) codes[i] = uint8_t(int32_t((y[i] + kShift) - kShift) + zero);
            for (int p = 0; p < P; p++) std::memcpy(end.out[from + r] + run.at[p], codes + p * kWidth, kWidth);
        }
    }
}

constexpr int kMost = kVectors >= 32 ? 8 : 6;  // vectors of a tile of one filter

// `vectors`: up to kWide for blocks of 8 filters, up to kMost for single ones.
TARGET inline void floats(const Run& run, const FloatEnd& end, int block, int vectors) {
    if (block == 8) {
        switch (vectors) {
            case 1: return floats_of<1, 8>(run, end);
            case 2: return floats_of<2, 8>(run, end);
            default: return floats_of<kWide, 8>(run, end);
        }
    }
    switch (vectors) {
        case 1: return floats_of<1, 1>(run, end);
        case 2: return floats_of<2, 1>(run, end);
        case 3: return floats_of<3, 1>(run, end);
        case 4: return floats_of<4, 1>(run, end);
        case 5: return floats_of<5, 1>(run, end);
        case 6: return floats_of<6, 1>(run, end);
        case 7: if constexpr (kMost >= 7) return floats_of<7, 1>(run, end); else return;
        default: if constexpr (kMost >= 8) return floats_of<8, 1>(run, end); else return;
    }
}

TARGET inline void bytes(const Run& run, const ByteEnd& end, int vectors) {
    switch (vectors) {
        case 1: return bytes_of<1, 8>(run, end);
        case 2: return bytes_of<2, 8>(run, end);
        default: return bytes_of<kWide, 8>(run, end);
    }
}

// Rows of a plane: `n` pixels, `step` apart, of each of some rows that lie `from_stride` and `to_stride` apart. Reads
// no pixel behind the last one that is wanted.
TARGET inline void pick(const uint32_t* from, int64_t from_stride, int step, int n, int rows, uint32_t* to, int64_t to_stride) {
    typedef uint32_t W __attribute__((vector_size(kWidth * 4)));
    W even{};  // of two vectors that overlap by one
    for (int i = 0; i < kWidth; i++) even[i] = uint32_t(2 * i < kWidth ? 2 * i : 2 * i + 1);
    for (int r = 0; r < rows; r++, from += from_stride, to += to_stride) {
        if (step == 2 && n >= kWidth) {
            for (int i = 0; i < n; i += kWidth) {
                const int at = i + kWidth <= n ? i : n - kWidth;
                const W a = load<W>(from + 2 * at), b = load<W>(from + 2 * at + kWidth - 1);
                store(to + at, __builtin_shuffle(a, b, even));
            }
        } else if (step == 1) {
            std::memcpy(to, from, sizeof(uint32_t) * size_t(n));
        } else {
            for (int i = 0; i < n; i++) to[i] = from[int64_t(i) * step];
        }
    }
}

}  // namespace LANES
