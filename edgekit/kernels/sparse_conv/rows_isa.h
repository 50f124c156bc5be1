// The inner products, once per instruction set (so no include guard): rows.h includes this with
//   LANES  the namespace          TARGET  the function attribute of the instruction set
//   F, I   vectors of kWidth floats and of kWidth int32
//   LOAD_F STORE_F SET_F FMA(a, b, c)    LOAD_I STORE_I ADD_I and DOT(c, x, w): c += the four int8 products of x, w
//   SET_X  four int8 of the input, broadcast, as DOT wants them
// A block is R output rows by N vectors of channels, kept in registers while one kernel position's weights stream
// by. Every sum runs over positions, then input channels, in rising order, whatever R, N and the width are.

namespace LANES {

// Rows that N vectors of channels leave registers for.
template <int N>
constexpr int rows_of() {
    return kVectors >= 32 ? (N == 1 ? 12 : N == 2 ? 12 : 6) : (N == 1 ? 10 : N == 2 ? 6 : 2);
}

template <int R, int N>
TARGET void block(const float* const* in, const float* w, int channels, float* const* sums) {
    F c[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) c[r][n] = LOAD_F(sums[r] + n * kWidth);
    for (int i = 0; i < channels; i++, w += N * kWidth) {
        F v[N];
        for (int n = 0; n < N; n++) v[n] = LOAD_F(w + n * kWidth);
        for (int r = 0; r < R; r++) {
            const F x = SET_F(in[r][i]);
            for (int n = 0; n < N; n++) c[r][n] = FMA(x, v[n], c[r][n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) STORE_F(sums[r] + n * kWidth, c[r][n]);
}

// channels: a multiple of 4; w: int8 [channels / 4][N * kWidth][4]; offset: added once per row.
template <int R, int N>
TARGET void block(const int8_t* const* in, const int8_t* w, const int32_t* offset, int channels, int32_t* const* sums) {
    I c[R][N];
    for (int n = 0; n < N; n++) {
        const I o = LOAD_I(offset + n * kWidth);
        for (int r = 0; r < R; r++) c[r][n] = ADD_I(LOAD_I(sums[r] + n * kWidth), o);
    }
    for (int i = 0; i < channels; i += 4, w += N * kWidth * 4) {
        I v[N];
        for (int n = 0; n < N; n++) v[n] = LOAD_I(w + n * kWidth * 4);
        for (int r = 0; r < R; r++) {
            const I x = SET_X(in[r] + i);
            for (int n = 0; n < N; n++) c[r][n] = DOT(c[r][n], x, v[n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) STORE_I(sums[r] + n * kWidth, c[r][n]);
}

// The pairs of one kernel position inside of one tile, for N vectors of output channels.
template <int N, int R>
TARGET void some_rows(const Operand<float>& a, const int32_t* from, const uint8_t* to, int count) {
    const float* in[R];
    float* sums[R];
    for (int r = 0; r < R; r++) {
        in[r] = a.features + int64_t(from[r]) * a.channels;
        sums[r] = a.sums + int64_t(to[r]) * a.stride;
    }
    static_cast<void>(count);
    block<R, N>(in, a.weights, a.channels, sums);
}

template <int N, int R>
TARGET void some_rows(const Operand<int8_t>& a, const int32_t* from, const uint8_t* to, int count) {
    const int8_t* in[R];
    int32_t* sums[R];
    for (int r = 0; r < R; r++) {
        in[r] = a.features + int64_t(from[r]) * a.channels;
        sums[r] = a.sums + int64_t(to[r]) * a.stride;
    }
    static_cast<void>(count);
    block<R, N>(in, a.weights, a.offset, a.channels, sums);
}

template <int N, class T>
TARGET void pairs(const Operand<T>& a, const int32_t* from, const uint8_t* to, int count) {
    constexpr int kRows = rows_of<N>();
    // as even as can be: a short rest would leave most of the multipliers idle
    const int blocks = (count + kRows - 1) / kRows;
    for (int b = 0, at = 0; b < blocks; b++) {
        const int n = (count - at + blocks - b - 1) / (blocks - b);
        const int32_t* f = from + at;
        const uint8_t* t = to + at;
        at += n;
        switch (n) {
            case 1: some_rows<N, 1>(a, f, t, n); break;
            case 2: some_rows<N, 2>(a, f, t, n); break;
#define EDGEKIT_ROWS(R) case R: if constexpr (R <= kRows) some_rows<N, R>(a, f, t, n); break;
            EDGEKIT_ROWS(3) EDGEKIT_ROWS(4) EDGEKIT_ROWS(5) EDGEKIT_ROWS(6) EDGEKIT_ROWS(7) EDGEKIT_ROWS(8)
            EDGEKIT_ROWS(9) EDGEKIT_ROWS(10) EDGEKIT_ROWS(11) EDGEKIT_ROWS(12)
#undef EDGEKIT_ROWS
        }
    }
}

// `columns`: 1, 2 or 4 vectors.
template <class T>
TARGET void pairs(int columns, const Operand<T>& a, const int32_t* from, const uint8_t* to, int count) {
    if (columns == 4) pairs<4>(a, from, to, count);
    else if (columns == 2) pairs<2>(a, from, to, count);
    else pairs<1>(a, from, to, count);
}

// What becomes of sums, element by element; `at`: where they belong in the output. Every instruction set rounds alike.
template <bool kRelu>
TARGET void finish_some(float* __restrict y, const Finish& f, int64_t at, int64_t n) {
    if (f.add8) {
        const int8_t* __restrict more = f.add8 + at;
        const float scale = f.add_scale;
        for (int64_t o = 0; o < n; o++) y[o] += float(more[o]) * scale;
    } else if (f.add) {
        const float* __restrict more = f.add + at;
        for (int64_t o = 0; o < n; o++) y[o] += more[o];
    }
    if (kRelu)
        for (int64_t o = 0; o < n; o++) y[o] = y[o] < 0.0f ? 0.0f : y[o];  // NaN stays
    if (f.out) {
        std::memcpy(f.out + at, y, sizeof(float) * size_t(n));
        return;
    }
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: no fraction fits beside it, so the sum is rounded to even
    int8_t* __restrict out = f.out8 + at;
    const float scale = f.out_scale;
    // one comparison a loop: GCC makes branches of two
    for (int64_t o = 0; o < n; o++) y[o] = y[o] / scale > -127.0f ? y[o] / scale : -127.0f;
    for (int64_t o = 0; o < n; o++) y[o] = y[o] < 127.0f ? y[o] : 127.0f;
    for (int64_t o = 0; o < n; o++) out[o] = int8_t(int32_t((y[o] + kShift) - kShift));
}

TARGET inline void finish(const Finish& f, float* y, int64_t at, int64_t n) {
    f.relu ? finish_some<true>(y, f, at, n) : finish_some<false>(y, f, at, n);
}

// y = sum * scale + bias, channel by channel.
TARGET inline void scaled(const Finish& f, const int32_t* __restrict sums, float* __restrict y, int channels) {
    const float *__restrict scale = f.scale, *__restrict bias = f.bias;
    for (int o = 0; o < channels; o++) y[o] = float(sums[o]) * scale[o] + bias[o];
}

}  // namespace LANES
