// Letterbox in one pass over the picture. reference.py defines the arithmetic; every code path here
// gives its bits: integers up to the 8-bit level, then one subtraction and one division in float32
// (the module is compiled with contraction off) and a conversion that rounds to nearest even.
//
// Row by row, as cv2 does it: the two source rows of an output row are resampled horizontally into
// 16-bit row buffers (kept while the next output row needs them), then blended vertically, normalised
// and stored in the layout of the network, so that no intermediate picture exists.
#include "common.h"

#include <algorithm>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define EDGEKIT_AVX2 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define EDGEKIT_NEON 1
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define EDGEKIT_INLINE inline __attribute__((always_inline))
#else
#define EDGEKIT_INLINE inline
#endif

namespace edgekit {
namespace {

enum class Out { f32, f16, u8 };

// What a horizontal pass needs to know. Rows of `dst` are [3][plane] if planar, else [n][3].
struct Horizontal {
    int n;                    // output pixels
    int safe;                 // leading ones whose 8-byte load stays inside the source row
    int channels;             // bytes per source pixel
    int last;                 // byte offset of the last source pixel
    const int32_t* offset;    // [n] byte offset of the first tap
    const uint32_t* weight;   // [n] both weights, first in the low half
    const int* order;         // [3] source channel of each output channel
    const uint8_t* shuffle;   // [16] bytes of one pixel pair as 16-bit (first, second) x 3 channels
    bool planar;
    int plane;
};

inline void horizontal_scalar(const Horizontal& s, const uint8_t* row, int from, uint16_t* dst) {
    const int step = s.planar ? 1 : 3, plane = s.planar ? s.plane : 1;
    for (int x = from; x < s.n; x++) {
        const uint8_t* first = row + s.offset[x];
        const uint8_t* second = row + std::min(s.offset[x] + s.channels, s.last);
        const int a = int(s.weight[x] & 0xffff), b = int(s.weight[x] >> 16);
        for (int c = 0; c < 3; c++) {
            const int k = s.order[c];
            dst[x * step + c * plane] = uint16_t((a * first[k] + b * second[k] + 8) >> 4);
        }
    }
}

void horizontal_portable(const Horizontal& s, const uint8_t* row, const uint8_t*, uint16_t* dst) {
    horizontal_scalar(s, row, 0, dst);
}

// A frame comes from memory, and the rows skipped between two output rows lead hardware prefetchers
// astray: each block asks for its like in the rows that are needed next.
EDGEKIT_INLINE void prefetch(const uint8_t* ahead, int32_t offset) {
#if defined(__GNUC__)
    __builtin_prefetch(ahead + offset);
#endif
}

EDGEKIT_INLINE int blend(int top, int bottom, const uint16_t* h0, const uint16_t* h1, int i) {
    return (top * h0[i] + bottom * h1[i] + (1 << 17)) >> 18;
}

// IEEE half from float, to nearest even: for machines without an instruction for it.
inline uint16_t half_bits(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past the largest half
    if (a < 0x38800000u) {                                  // subnormal: the float adder rounds for us
        float f;
        std::memcpy(&f, &a, 4);
        f += 0.5f;
        uint32_t r;
        std::memcpy(&r, &f, 4);
        return uint16_t(sign | (r - 0x3f000000u));
    }
    return uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

// Vertical pass of n values; mean and std per value. `plain`: nothing to normalise.
struct Vertical {
    int n;
    int top, bottom;  // weights
    const uint16_t *h0, *h1;
    const float *mean, *std;
    bool plain;
};

EDGEKIT_INLINE void vertical_f32(const Vertical& v, float* dst) {
    const int n = v.n, top = v.top, bottom = v.bottom;
    const uint16_t *h0 = v.h0, *h1 = v.h1;
    if (v.plain) {
        for (int i = 0; i < n; i++) dst[i] = float(blend(top, bottom, h0, h1, i));
        return;
    }
    const float *mean = v.mean, *std = v.std;
    for (int i = 0; i < n; i++) dst[i] = (float(blend(top, bottom, h0, h1, i)) - mean[i]) / std[i];
}

EDGEKIT_INLINE void vertical_u8(const Vertical& v, uint8_t* dst) {
    const int n = v.n, top = v.top, bottom = v.bottom;
    const uint16_t *h0 = v.h0, *h1 = v.h1;
    for (int i = 0; i < n; i++) dst[i] = uint8_t(blend(top, bottom, h0, h1, i));
}

inline void vertical_f16_scalar(const Vertical& v, int from, uint16_t* dst) {
    for (int i = from; i < v.n; i++)
        dst[i] = half_bits((float(blend(v.top, v.bottom, v.h0, v.h1, i)) - v.mean[i]) / v.std[i]);
}

void vertical_portable(const Vertical& v, Out type, void* dst) {
    if (type == Out::f32) vertical_f32(v, static_cast<float*>(dst));
    else if (type == Out::u8) vertical_u8(v, static_cast<uint8_t*>(dst));
    else vertical_f16_scalar(v, 0, static_cast<uint16_t*>(dst));
}

#if EDGEKIT_AVX2
#define TARGET __attribute__((target("avx2,f16c")))

TARGET inline __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// Pixels x (low lane) and x + 4 (high lane): 32-bit sums, rounded to 7 fractional bits.
template <int lane>
TARGET EDGEKIT_INLINE __m256i two_pixels(const uint8_t* row, const int32_t* offset, __m256i shuffle, __m256i weight) {
    __m256i pair = _mm256_inserti128_si256(_mm256_castsi128_si256(load8(row + offset[lane])),
                                           load8(row + offset[lane + 4]), 1);
    pair = _mm256_shuffle_epi8(pair, shuffle);
    const __m256i sum = _mm256_madd_epi16(pair, _mm256_shuffle_epi32(weight, lane * 0x55));
    return _mm256_srli_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(8)), 4);
}

TARGET void horizontal_avx2(const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) {
    const __m256i shuffle = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.shuffle)));
    int x = 0;
    for (; x + 8 <= s.safe; x += 8) {
        const int32_t* offset = s.offset + x;
        const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.weight + x));
        prefetch(ahead, offset[0]), prefetch(ahead, offset[4]);
        // each lane: channels 0 1 2 - of pixel 0, then of pixel 1
        const __m256i p01 = _mm256_packus_epi32(two_pixels<0>(row, offset, shuffle, weight),
                                                two_pixels<1>(row, offset, shuffle, weight));
        const __m256i p23 = _mm256_packus_epi32(two_pixels<2>(row, offset, shuffle, weight),
                                                two_pixels<3>(row, offset, shuffle, weight));
        if (s.planar) {
            const __m256i even = _mm256_unpacklo_epi16(p01, p23), odd = _mm256_unpackhi_epi16(p01, p23);
            __m256i c01 = _mm256_unpacklo_epi16(even, odd), c2 = _mm256_unpackhi_epi16(even, odd);
            c01 = _mm256_permute4x64_epi64(c01, 0xd8);
            c2 = _mm256_permute4x64_epi64(c2, 0xd8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + x), _mm256_castsi256_si128(c01));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + s.plane + x), _mm256_extracti128_si256(c01, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * s.plane + x), _mm256_castsi256_si128(c2));
        } else {  // in order: the fourth value of each store is overwritten by the next pixel
            const __m128i quads[4] = {_mm256_castsi256_si128(p01), _mm256_castsi256_si128(p23),
                                      _mm256_extracti128_si256(p01, 1), _mm256_extracti128_si256(p23, 1)};
            for (int k = 0; k < 4; k++) {
                uint16_t* p = dst + 3 * (x + 2 * k);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(p), quads[k]);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 3), _mm_unpackhi_epi64(quads[k], quads[k]));
            }
        }
    }
    horizontal_scalar(s, row, x, dst);
}

// 16 blended values as 2 x 8 int32, in order.
TARGET EDGEKIT_INLINE void blend16(const Vertical& v, __m256i weight, int i, __m256i& lo, __m256i& hi) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v.h0 + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v.h1 + i));
    const __m256i half = _mm256_set1_epi32(1 << 17);
    const __m256i x = _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weight);
    const __m256i y = _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weight);
    const __m256i p = _mm256_srli_epi32(_mm256_add_epi32(x, half), 18);
    const __m256i q = _mm256_srli_epi32(_mm256_add_epi32(y, half), 18);
    lo = _mm256_permute2x128_si256(p, q, 0x20);
    hi = _mm256_permute2x128_si256(p, q, 0x31);
}

TARGET EDGEKIT_INLINE __m256 normalise8(const Vertical& v, __m256i levels, int i) {
    const __m256 x = _mm256_cvtepi32_ps(levels);
    if (v.plain) return x;
    return _mm256_div_ps(_mm256_sub_ps(x, _mm256_loadu_ps(v.mean + i)), _mm256_loadu_ps(v.std + i));
}

TARGET void vertical_avx2(const Vertical& v, Out type, void* dst) {
    if (type == Out::u8) return vertical_u8(v, static_cast<uint8_t*>(dst));
    const __m256i weight = _mm256_set1_epi32(v.top | (v.bottom << 16));
    int i = 0;
    __m256i lo, hi;
    if (type == Out::f32) {
        float* out = static_cast<float*>(dst);
        for (; i + 16 <= v.n; i += 16) {
            blend16(v, weight, i, lo, hi);
            _mm256_storeu_ps(out + i, normalise8(v, lo, i));
            _mm256_storeu_ps(out + i + 8, normalise8(v, hi, i + 8));
        }
        const Vertical rest{v.n - i, v.top, v.bottom, v.h0 + i, v.h1 + i, v.mean + i, v.std + i, v.plain};
        return vertical_f32(rest, out + i);
    }
    uint16_t* out = static_cast<uint16_t*>(dst);
    for (; i + 16 <= v.n; i += 16) {
        blend16(v, weight, i, lo, hi);
        const __m128i a = _mm256_cvtps_ph(normalise8(v, lo, i), _MM_FROUND_TO_NEAREST_INT);
        const __m128i b = _mm256_cvtps_ph(normalise8(v, hi, i + 8), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), a);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i + 8), b);
    }
    vertical_f16_scalar(v, i, out);
}
#undef TARGET
#endif

#if EDGEKIT_NEON
EDGEKIT_INLINE uint16x4_t one_pixel(const uint8_t* row, int32_t offset, uint8x8_t shuffle, uint32_t weight) {
    // channels 0 1 2 - of the first tap, then of the second
    const uint16x8_t pair = vmovl_u8(vtbl1_u8(vld1_u8(row + offset), shuffle));
    const uint32x4_t sum = vmlal_n_u16(vmull_n_u16(vget_low_u16(pair), uint16_t(weight & 0xffff)),
                                       vget_high_u16(pair), uint16_t(weight >> 16));
    return vrshrn_n_u32(sum, 4);
}

void horizontal_neon(const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) {
    uint8_t order[8];  // s.shuffle names (first, second) x 3 as 16-bit values
    for (int c = 0; c < 4; c++) {
        order[c] = s.shuffle[4 * c];
        order[c + 4] = s.shuffle[4 * c + 2];
    }
    const uint8x8_t shuffle = vld1_u8(order);
    int x = 0;
    for (; x + 4 <= s.safe; x += 4) {
        const int32_t* offset = s.offset + x;
        const uint32_t* weight = s.weight + x;
        prefetch(ahead, offset[0]);
        const uint16x4_t p0 = one_pixel(row, offset[0], shuffle, weight[0]);
        const uint16x4_t p1 = one_pixel(row, offset[1], shuffle, weight[1]);
        const uint16x4_t p2 = one_pixel(row, offset[2], shuffle, weight[2]);
        const uint16x4_t p3 = one_pixel(row, offset[3], shuffle, weight[3]);
        if (s.planar) {
            const uint16x8_t p01 = vcombine_u16(p0, p1), p23 = vcombine_u16(p2, p3);
            const uint16x8_t even = vzip1q_u16(p01, p23), odd = vzip2q_u16(p01, p23);
            const uint16x8_t c01 = vzip1q_u16(even, odd), c2 = vzip2q_u16(even, odd);
            vst1_u16(dst + x, vget_low_u16(c01));
            vst1_u16(dst + s.plane + x, vget_high_u16(c01));
            vst1_u16(dst + 2 * s.plane + x, vget_low_u16(c2));
        } else {  // in order: the fourth value of each store is overwritten by the next pixel
            vst1_u16(dst + 3 * x, p0);
            vst1_u16(dst + 3 * x + 3, p1);
            vst1_u16(dst + 3 * x + 6, p2);
            vst1_u16(dst + 3 * x + 9, p3);
        }
    }
    horizontal_scalar(s, row, x, dst);
}

EDGEKIT_INLINE float32x4_t normalise4(const Vertical& v, uint32x4_t sum, int i) {
    const float32x4_t x = vcvtq_f32_u32(vrshrq_n_u32(sum, 18));
    return v.plain ? x : vdivq_f32(vsubq_f32(x, vld1q_f32(v.mean + i)), vld1q_f32(v.std + i));
}

void vertical_neon(const Vertical& v, Out type, void* dst) {
    if (type == Out::u8) return vertical_u8(v, static_cast<uint8_t*>(dst));
    const uint16_t top = uint16_t(v.top), bottom = uint16_t(v.bottom);
    int i = 0;
    for (; i + 8 <= v.n; i += 8) {
        const uint16x8_t a = vld1q_u16(v.h0 + i), b = vld1q_u16(v.h1 + i);
        const uint32x4_t lo = vmlal_n_u16(vmull_n_u16(vget_low_u16(a), top), vget_low_u16(b), bottom);
        const uint32x4_t hi = vmlal_n_u16(vmull_n_u16(vget_high_u16(a), top), vget_high_u16(b), bottom);
        const float32x4_t x = normalise4(v, lo, i), y = normalise4(v, hi, i + 4);
        if (type == Out::f32) {
            vst1q_f32(static_cast<float*>(dst) + i, x);
            vst1q_f32(static_cast<float*>(dst) + i + 4, y);
        } else {
            const float16x8_t h = vcombine_f16(vcvt_f16_f32(x), vcvt_f16_f32(y));
            vst1q_u16(static_cast<uint16_t*>(dst) + i, vreinterpretq_u16_f16(h));
        }
    }
    const Vertical rest{v.n - i, v.top, v.bottom, v.h0 + i, v.h1 + i, v.mean + i, v.std + i, v.plain};
    if (type == Out::f32) vertical_f32(rest, static_cast<float*>(dst) + i);
    else vertical_f16_scalar(v, i, static_cast<uint16_t*>(dst));
}
#endif

class Letterbox {
public:
    Letterbox(std::tuple<int, int, int> in_shape, std::pair<int, int> out_size, std::pair<int, int> corner, bool nhwc,
              const std::string& dtype, const py::array_t<int32_t, py::array::c_style>& x_index,
              const py::array_t<int32_t, py::array::c_style>& x_weight,
              const py::array_t<int32_t, py::array::c_style>& y_index,
              const py::array_t<int32_t, py::array::c_style>& y_weight, std::tuple<int, int, int> order,
              const py::array_t<float, py::array::c_style>& mean, const py::array_t<float, py::array::c_style>& std,
              const py::array_t<uint8_t, py::array::c_style>& pad, const std::string& isa)
        : y_index_(copy(y_index)), y_weight_(copy(y_weight)) {
        std::tie(in_h_, in_w_, channels_) = in_shape;
        std::tie(out_h_, out_w_) = out_size;
        std::tie(top_, left_) = corner;
        std::tie(order_[0], order_[1], order_[2]) = order;
        nhwc_ = nhwc;
        type_ = dtype == "float32" ? Out::f32 : dtype == "float16" ? Out::f16 : Out::u8;
        item_ = type_ == Out::f32 ? 4 : type_ == Out::f16 ? 2 : 1;
        w_ = int(x_index.size());
        h_ = int(y_index.size());
        check(x_weight.size() == w_ && y_weight.size() == h_ && mean.size() == 3 && std.size() == 3, "letterbox tables");
        check(pad.size() == 3 * item_, "letterbox padding");
        check(top_ >= 0 && left_ >= 0 && top_ + h_ <= out_h_ && left_ + w_ <= out_w_, "letterbox placement");
        plane_ = (w_ + 15) / 16 * 16;
        plain_ = true;
        for (int c = 0; c < 3; c++) {
            check(order_[c] >= 0 && order_[c] < channels_, "letterbox channel order");
            plain_ = plain_ && mean.data()[c] == 0.0f && std.data()[c] == 1.0f;
        }
        safe_ = w_;
        for (int x = 0; x < w_; x++) {
            const int index = x_index.data()[x], weight = x_weight.data()[x];
            check(index >= 0 && index < in_w_ && weight >= 0 && weight <= 2048, "letterbox columns");
            offset_.push_back(index * channels_);
            weight_.push_back(uint32_t(2048 - weight) | uint32_t(weight) << 16);
            if (safe_ == w_ && offset_.back() + 8 > in_w_ * channels_) safe_ = x;
        }
        for (int y = 0; y < h_; y++)
            check(y_index_[y] >= 0 && y_index_[y] < in_h_ && y_weight_[y] >= 0 && y_weight_[y] <= 2048, "letterbox rows");
        std::memset(shuffle_, 0x80, sizeof shuffle_);  // 0x80 and above: zero, for SSE and NEON alike
        for (int c = 0; c < 3; c++) {
            shuffle_[4 * c] = uint8_t(order_[c]);
            shuffle_[4 * c + 2] = uint8_t(order_[c] + channels_);
        }
        // per value of an output row: [w][3], or per plane the same value all along
        for (int i = 0; i < 3 * w_; i++) {
            mean_.push_back(mean.data()[nhwc ? i % 3 : i / w_]);
            std_.push_back(std.data()[nhwc ? i % 3 : i / w_]);
        }
        for (int i = 0; i < 3 * out_w_; i++) {
            const uint8_t* value = pad.data() + (nhwc ? i % 3 : i / out_w_) * item_;
            pad_.insert(pad_.end(), value, value + item_);
        }
        const Isa best = detect_isa();
        check(isa == "auto" || isa == "portable" || isa == isa_name(best), "letterbox isa");
        isa_ = isa == "portable" ? Isa::portable : best;
    }

    void run(const py::array_t<uint8_t>& image, py::array out, bool padded) const {
        check(image.ndim() == 3 && image.shape(0) == in_h_ && image.shape(1) == in_w_ && image.shape(2) == channels_,
              "letterbox picture");
        check(out.nbytes() == py::ssize_t(item_) * 3 * out_h_ * out_w_, "letterbox out");
        const uint8_t* src = image.data();
        const ptrdiff_t stride = image.strides(0);
        uint8_t* dst = static_cast<uint8_t*>(out.mutable_data());
        py::gil_scoped_release release;
        run(src, stride, dst, padded);
    }

private:
    void run(const uint8_t* src, ptrdiff_t stride, uint8_t* dst, bool padded) const {
        // one per thread, grown once: a plan is shared by threads and allocates nothing per call
        static thread_local std::vector<uint16_t> scratch;
        const size_t row = size_t(3) * plane_ + 16;
        if (scratch.size() < 2 * row) scratch.resize(2 * row);
        uint16_t* rows[2] = {scratch.data(), scratch.data() + row};
        int held[2] = {-1, -1};

        const Horizontal s{w_, safe_, channels_, (in_w_ - 1) * channels_, offset_.data(), weight_.data(),
                           order_, shuffle_, !nhwc_, plane_};
        if (!padded) pad_rows(dst, 0, top_);
        for (int y = 0; y < h_; y++) {
            const int j = y_index_[y], bottom = y_weight_[y], next = std::min(j + 1, in_h_ - 1);
            const uint8_t* ahead = src + (y + 1 < h_ ? y_index_[y + 1] : j) * stride;  // rows needed next
            const ptrdiff_t ahead_next = y + 1 < h_ && y_index_[y + 1] + 1 < in_h_ ? stride : 0;
            if (held[0] != j && held[1] == j) {
                std::swap(rows[0], rows[1]);
                std::swap(held[0], held[1]);
            }
            if (held[0] != j) horizontal(s, src + j * stride, ahead, rows[0]), held[0] = j;
            const uint16_t* second = rows[0];  // weight 0: any row will do
            if (bottom != 0 && next != j) {
                if (held[1] != next) horizontal(s, src + next * stride, ahead + ahead_next, rows[1]), held[1] = next;
                second = rows[1];
            }
            store_row(dst, top_ + y, rows[0], second, bottom);
        }
        if (!padded) pad_rows(dst, top_ + h_, out_h_);
    }

    void horizontal(const Horizontal& s, const uint8_t* row, const uint8_t* ahead, uint16_t* dst) const {
#if EDGEKIT_AVX2
        if (isa_ == Isa::avx2) return horizontal_avx2(s, row, ahead, dst);
#elif EDGEKIT_NEON
        if (isa_ == Isa::neon) return horizontal_neon(s, row, ahead, dst);
#endif
        horizontal_portable(s, row, ahead, dst);
    }

    void vertical(const Vertical& v, void* dst) const {
#if EDGEKIT_AVX2
        if (isa_ == Isa::avx2) return vertical_avx2(v, type_, dst);
#elif EDGEKIT_NEON
        if (isa_ == Isa::neon) return vertical_neon(v, type_, dst);
#endif
        vertical_portable(v, type_, dst);
    }

    // Rows of one plane: `run` calls of NHWC have one plane of 3 values per pixel.
    void store_row(uint8_t* dst, int y, const uint16_t* h0, const uint16_t* h1, int bottom) const {
        const int planes = nhwc_ ? 1 : 3, values = nhwc_ ? 3 : 1;
        const size_t pixel = size_t(item_) * values;
        const int right = out_w_ - left_ - w_;
        for (int c = 0; c < planes; c++) {
            uint8_t* row = dst + (size_t(c) * out_h_ + y) * out_w_ * pixel;
            const uint8_t* pad = pad_.data() + c * out_w_ * pixel;
            std::memcpy(row, pad, left_ * pixel);
            const Vertical v{w_ * values, 2048 - bottom, bottom, h0 + c * plane_, h1 + c * plane_,
                             mean_.data() + c * w_, std_.data() + c * w_, plain_};
            vertical(v, row + left_ * pixel);
            std::memcpy(row + (left_ + w_) * pixel, pad, right * pixel);
        }
    }

    void pad_rows(uint8_t* dst, int from, int to) const {
        const int planes = nhwc_ ? 1 : 3;
        const size_t bytes = size_t(out_w_) * item_ * (nhwc_ ? 3 : 1);
        for (int c = 0; c < planes; c++)
            for (int y = from; y < to; y++)
                std::memcpy(dst + (size_t(c) * out_h_ + y) * bytes, pad_.data() + c * bytes, bytes);
    }

    int in_h_, in_w_, channels_, out_h_, out_w_, top_, left_, w_, h_, plane_, safe_, item_, order_[3];
    bool nhwc_, plain_;
    Out type_;
    Isa isa_;
    std::vector<int32_t> y_index_, y_weight_, offset_;
    std::vector<uint32_t> weight_;
    uint8_t shuffle_[16];
    std::vector<float> mean_, std_;
    std::vector<uint8_t> pad_;
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(letterbox, m) {
    using edgekit::Letterbox;
    py::class_<Letterbox>(m, "Letterbox")
        .def(py::init<std::tuple<int, int, int>, std::pair<int, int>, std::pair<int, int>, bool, const std::string&,
                      const py::array_t<int32_t, py::array::c_style>&, const py::array_t<int32_t, py::array::c_style>&,
                      const py::array_t<int32_t, py::array::c_style>&, const py::array_t<int32_t, py::array::c_style>&,
                      std::tuple<int, int, int>, const py::array_t<float, py::array::c_style>&,
                      const py::array_t<float, py::array::c_style>&, const py::array_t<uint8_t, py::array::c_style>&,
                      const std::string&>(),
             py::kw_only(), py::arg("in_shape"), py::arg("out_size"), py::arg("corner"), py::arg("nhwc"),
             py::arg("dtype"), py::arg("x_index"), py::arg("x_weight"), py::arg("y_index"), py::arg("y_weight"),
             py::arg("order"), py::arg("mean"), py::arg("std"), py::arg("pad"), py::arg("isa"))
        .def("run", py::overload_cast<const py::array_t<uint8_t>&, py::array, bool>(&Letterbox::run, py::const_),
             py::arg("image").noconvert(), py::arg("out").noconvert(), py::arg("padded"));
}
