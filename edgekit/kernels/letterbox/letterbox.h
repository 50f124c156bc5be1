// Letterbox in one pass over the picture. reference.py defines the arithmetic; every code path here
// gives its bits: integers up to the 8-bit level, then values that are looked up or computed in float32
// (compiled with contraction off).
//
// Row by row, as cv2 does it: the source rows of an output row are resampled horizontally into 16-bit
// row buffers (kept while the next output row needs them), then blended vertically, converted, and stored
// as the network's values in its layout, so that no intermediate picture exists. packed.h, yuv.h and area.h
// make levels, finish.h stores them.
#pragma once

#include "area.h"
#include "packed.h"
#include "yuv_simd.h"

namespace edgekit {
namespace {

// As edgekit.pixels has them.
enum class Pixel { bgr, rgb, bgra, rgba, grey, yuyv, uyvy, nv12, nv21, i420 };

enum class Kind { packed, yuv_packed, yuv_pairs, yuv_planes };

inline Kind kind_of(Pixel format) {
    if (format == Pixel::yuyv || format == Pixel::uyvy) return Kind::yuv_packed;
    if (format == Pixel::nv12 || format == Pixel::nv21) return Kind::yuv_pairs;
    return format == Pixel::i420 ? Kind::yuv_planes : Kind::packed;
}

// Bytes of a pixel of the first plane.
inline int channels_of(Pixel format) {
    switch (format) {
        case Pixel::bgr: case Pixel::rgb: return 3;
        case Pixel::bgra: case Pixel::rgba: return 4;
        case Pixel::yuyv: case Pixel::uyvy: return 2;
        default: return 1;
    }
}

// Where the planes of a picture begin and how far apart their rows lie.
struct Source {
    const uint8_t* plane[3];
    ptrdiff_t stride[3];
};

// What depends on the picture's layout and the rule only: `Tables` of reference.py, and where it goes.
struct LetterboxTables {
    Pixel format;
    int in_h, in_w, out_h, out_w, top, left;
    bool nhwc;
    Out type;
    std::vector<int32_t> x_index, x_weight, y_index, y_weight;
    int order[3];
    std::vector<int32_t> color;        // 7 numbers of YUV pictures
    std::vector<FilterTaps> filters;   // x and y of luma, then of chroma; none: bilinear
    float mean[3], std[3];
    std::vector<uint8_t> values, pad;  // [3][256] and [3] of the input's type
};

class Letterbox {
public:
    // best: the instruction set to use, `portable` or the machine's own.
    Letterbox(LetterboxTables t, Isa best) : y_index_(std::move(t.y_index)), y_weight_(std::move(t.y_weight)), table_(std::move(t.values)) {
        in_h_ = t.in_h, in_w_ = t.in_w, out_h_ = t.out_h, out_w_ = t.out_w;
        top_ = t.top, left_ = t.left;
        for (int c = 0; c < 3; c++) order_[c] = t.order[c];
        isa_ = best;
        nhwc_ = t.nhwc;
        kind_ = kind_of(t.format);
        second_ = t.format == Pixel::uyvy || t.format == Pixel::nv21;
        channels_ = channels_of(t.format);
        for (int c = 0; c < 3; c++)
            check(order_[c] >= 0 && order_[c] < (kind_ == Kind::packed ? channels_ : 3), "letterbox channel order");
        w_ = int(t.x_index.size());
        h_ = int(y_index_.size());
        check(w_ > 0 && h_ > 0, "letterbox tables");
        check(int(t.x_weight.size()) == w_ && int(y_weight_.size()) == h_, "letterbox tables");
        check(top_ >= 0 && left_ >= 0 && top_ + h_ <= out_h_ && left_ + w_ <= out_w_, "letterbox placement");
        const int one = kind_ == Kind::packed ? 1 << 11 : 1 << 15;
        for (int x = 0; x < w_; x++) {
            const int index = t.x_index[x], weight = t.x_weight[x];
            check(index >= 0 && index < in_w_ && weight >= 0 && weight < one, "letterbox columns");
        }
        for (int y = 0; y < h_; y++)
            check(y_index_[y] >= 0 && y_index_[y] < in_h_ && y_weight_[y] >= 0 && y_weight_[y] < one, "letterbox rows");
        set_filters(t.filters);
        halves_ = t.x_index[0] % 2 == 0 && y_index_[0] % 2 == 0;
        for (int x = 0; x < w_; x++)
            halves_ = halves_ && t.x_weight[x] == one / 2 && t.x_index[x] == t.x_index[0] + 2 * x;
        for (int y = 0; y < h_; y++)
            halves_ = halves_ && y_weight_[y] == one / 2 && y_index_[y] == y_index_[0] + 2 * y;
        // one output pixel of a larger picture may look the same to bilinear taps
        if (!filters_.empty()) halves_ = halves_ && filters_[0].total == 2 && filters_[1].total == 2;
        left_pixel_ = t.x_index[0];
        set_values(t);
        plane_ = (w_ + 63) / 64 * 64;
        if (kind_ == Kind::packed) {
            set_taps(t);
        } else {
            check(t.color.size() == 7, "letterbox color");
            const int32_t* c = t.color.data();
            color_ = {int16_t(c[0]), int16_t(c[1]), int16_t(c[2]), int16_t(c[3]), int16_t(c[4]), int16_t(c[5])};
            set_columns(luma_, t, 0, in_w_);
            set_columns(chroma_, t, 1, (in_w_ + 1) / 2);
        }
    }

    // The instruction set that `detect_isa` finds, where all of what is used here is there.
    static Isa best_isa() {
#if EDGEKIT_HAS_AVX2
        if (!__builtin_cpu_supports("fma")) return Isa::portable;
#endif
        return detect_isa();
    }

    size_t out_bytes() const { return size_t(item_) * 3 * out_h_ * out_w_; }
    Kind kind() const { return kind_; }
    int channels() const { return channels_; }
    int in_height() const { return in_h_; }
    int in_width() const { return in_w_; }

    // Writes the picture into dst, out_bytes() of it. padded: its rows of padding are there from the last time.
    void run(const Source& source, uint8_t* dst, bool padded) const {
        // one per thread, grown once: a plan is shared by threads and allocates nothing per call
        static thread_local std::vector<uint8_t> scratch;
        const size_t row = (size_t(3) * plane_ + 64) * sizeof(int16_t), bytes = (size_t(in_w_) + 64) * 2;
        const size_t wanted = 2 * row + bytes + size_t(6) * plane_ + 192;
        if (scratch.size() < wanted) scratch.resize(wanted);
        uint8_t* at = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
        uint8_t* rows[2] = {at, at + row};
        uint8_t *levels = at + 2 * row, *turns = levels + 3 * plane_, *unpacked = turns + 3 * plane_;

        if (!padded) pad_rows(dst, 0, top_);
        if (halves_) run_halves(source, levels, turns, dst);
        else if (!filters_.empty()) run_area(source, rows[0], levels, turns, dst);
        else if (kind_ == Kind::packed) run_packed(source, rows, levels, turns, dst);
        else run_yuv(source, rows, unpacked, levels, turns, dst);
        if (!padded) pad_rows(dst, top_ + h_, out_h_);
    }

private:
    void set_values(const LetterboxTables& t) {
        finish_.type = t.type;
        item_ = finish_.type == Out::f32 ? 4 : finish_.type == Out::f16 ? 2 : 1;
        check(t.pad.size() == size_t(3) * item_ && table_.size() == size_t(3) * 256 * item_, "letterbox values");
        finish_.table = table_.data();
        finish_.bytes = Bytes::shifted;
        finish_.shift = table_[0];
        if (item_ == 1)
            for (int i = 0; i < 768; i++)
                if (table_[i] != uint8_t(i % 256 + table_[0])) finish_.bytes = Bytes::looked_up;
        bool plain = true, refined = true;
        for (int c = 0; c < 3; c++) {
            plain = plain && t.mean[c] == 0.0f && t.std[c] == 1.0f;
            refined = refined && refined_is_exact(t.mean[c], t.std[c]);
        }
        finish_.arithmetic = plain ? Arithmetic::plain : refined ? Arithmetic::refined : Arithmetic::divided;
        // per value of an output row: [w][3], or per plane the same value all along
        for (int i = 0; i < 3 * w_; i++) {
            const int c = nhwc_ ? i % 3 : i / w_;
            mean_.push_back(t.mean[c]);
            std_.push_back(t.std[c]);
            inverse_.push_back(1.0f / t.std[c]);
        }
        for (int i = 0; i < 3 * out_w_; i++) {
            const uint8_t* value = t.pad.data() + (nhwc_ ? i % 3 : i / out_w_) * item_;
            pad_.insert(pad_.end(), value, value + item_);
        }
        // a table per channel is looked up plane by plane
        planar_ = !nhwc_ || kind_ != Kind::packed || halves_ || !filters_.empty() || (item_ == 1 && finish_.bytes == Bytes::looked_up);
    }

    void set_filters(std::vector<FilterTaps>& filters) {
        if (filters.empty()) return;
        check(filters.size() == 4, "letterbox filters");
        const bool square = kind_ == Kind::yuv_pairs || kind_ == Kind::yuv_planes;
        const int sources[4] = {in_w_, in_h_, (in_w_ + 1) / 2, square ? (in_h_ + 1) / 2 : in_h_};
        for (int i = 0; i < 4; i++) filters_.emplace_back(std::move(filters[i]), i % 2 ? h_ : w_, sources[i]);
    }

    void set_taps(const LetterboxTables& t) {
        safe_ = w_;
        for (int x = 0; x < w_; x++) {
            const int index = t.x_index[x], weight = t.x_weight[x];
            offset_.push_back(index * channels_);
            weight_.push_back(uint32_t(2048 - weight) | uint32_t(weight) << 16);
            if (safe_ == w_ && offset_.back() + 8 > in_w_ * channels_) safe_ = x;
        }
        std::memset(shuffle_, 0x80, sizeof shuffle_);  // 0x80 and above: zero, for SSE and NEON alike
        for (int c = 0; c < 3; c++) {
            shuffle_[4 * c] = uint8_t(order_[c]);
            shuffle_[4 * c + 2] = uint8_t(order_[c] + channels_);
        }
        halving_mask_.resize(size_t(3) * channels_ * 16, 0x80);
        for (int c = 0; c < 3; c++)
            for (int i = 0; i < 16; i++) {
                const int byte = i * channels_ + order_[c];
                halving_mask_[(c * channels_ + byte / 16) * 16 + i] = uint8_t(byte % 16);
            }
    }

    void set_columns(Columns& columns, const LetterboxTables& t, int halved, int row_bytes) const {
        for (int x = 0; x < w_; x++) {
            const int index = t.x_index[x];
            columns.add(index >> halved, std::min(index + 1, in_w_ - 1) >> halved, t.x_weight[x]);
        }
        columns.finish(row_bytes);
    }

    void run_packed(const Source& source, uint8_t* const buffers[2], uint8_t* levels, uint8_t* turns, uint8_t* dst) const {
        const uint8_t* src = source.plane[0];
        const ptrdiff_t stride = source.stride[0];
        uint16_t* rows[2] = {reinterpret_cast<uint16_t*>(buffers[0]), reinterpret_cast<uint16_t*>(buffers[1])};
        int held[2] = {-1, -1};
        const Horizontal s{w_, safe_, channels_, (in_w_ - 1) * channels_, offset_.data(), weight_.data(),
                           order_, shuffle_, planar_, plane_};
        for (int y = 0; y < h_; y++) {
            const int j = y_index_[y], bottom = y_weight_[y], next = std::min(j + 1, in_h_ - 1);
            const uint8_t* ahead = src + (y + 1 < h_ ? y_index_[y + 1] : j) * stride;  // rows needed next
            const ptrdiff_t ahead_next = y + 1 < h_ && y_index_[y + 1] + 1 < in_h_ ? stride : 0;
            if (held[0] != j && held[1] == j) {
                std::swap(rows[0], rows[1]);
                std::swap(held[0], held[1]);
            }
            if (held[0] != j) horizontal(isa_, s, src + j * stride, ahead, rows[0]), held[0] = j;
            const uint16_t* second = rows[0];  // weight 0: any row will do
            if (bottom != 0 && next != j) {
                if (held[1] != next) horizontal(isa_, s, src + next * stride, ahead + ahead_next, rows[1]), held[1] = next;
                second = rows[1];
            }
            if (planar_) {
                for (int c = 0; c < 3; c++)
                    vertical(isa_, {w_, 2048 - bottom, bottom, rows[0] + c * plane_, second + c * plane_}, levels + c * plane_);
            } else {
                vertical(isa_, {3 * w_, 2048 - bottom, bottom, rows[0], second}, levels);
            }
            store_row(dst, top_ + y, levels, turns);
        }
    }

    // Two rows of one plane or of both chroma planes, resampled; rows that the next output row needs stay.
    struct Pair {
        int16_t* rows[2];
        int held[2] = {-1, -1};

        // Calls fill(j, row) for what is not there yet.
        template <class Fill>
        void take(int j, int next, bool both, const Fill& fill) {
            if (held[0] != j && held[1] == j) {
                std::swap(rows[0], rows[1]);
                std::swap(held[0], held[1]);
            }
            if (held[0] != j) fill(j, rows[0]), held[0] = j;
            if (both && next != j && held[1] != next) fill(next, rows[1]), held[1] = next;
        }
    };

    // Planes of levels by colour, in the order of the network; `order_` is its own inverse.
    Planes by_color(uint8_t* levels) const {
        return {levels + order_[0] * plane_, levels + order_[1] * plane_, levels + order_[2] * plane_};
    }

    void run_yuv(const Source& source, uint8_t* const buffers[2], uint8_t* unpacked, uint8_t* levels, uint8_t* turns,
                 uint8_t* dst) const {
        int16_t* rows[2] = {reinterpret_cast<int16_t*>(buffers[0]), reinterpret_cast<int16_t*>(buffers[1])};
        const bool packed = kind_ == Kind::yuv_packed;
        const int chroma_w = (in_w_ + 1) / 2, halved = packed ? 0 : 1;
        uint8_t *y_bytes = unpacked, *u_bytes = unpacked + in_w_ + 32, *v_bytes = u_bytes + chroma_w + 32;
        Pair luma{{rows[0], rows[1]}}, chroma{{rows[0] + plane_, rows[1] + plane_}};
        for (int y = 0; y < h_; y++) {
            const int j = y_index_[y], weight = y_weight_[y], next = std::min(j + 1, in_h_ - 1);
            if (packed) {
                luma.take(j, next, weight != 0, [&](int row, int16_t* to) {
                    const uint8_t* from = source.plane[0] + row * source.stride[0];
                    unpack_packed(isa_, from, second_, in_w_ / 2, y_bytes, u_bytes, v_bytes);
                    resample(isa_, luma_, y_bytes, to);
                    resample(isa_, chroma_, u_bytes, to + plane_);
                    resample(isa_, chroma_, v_bytes, to + 2 * plane_);
                });
                chroma.rows[0] = luma.rows[0] + plane_, chroma.rows[1] = luma.rows[1] + plane_;
            } else {
                luma.take(j, next, weight != 0, [&](int row, int16_t* to) {
                    resample(isa_, luma_, source.plane[0] + row * source.stride[0], to);
                });
                chroma.take(j >> 1, next >> 1, weight != 0, [&](int row, int16_t* to) {
                    const uint8_t *u = source.plane[1] + row * source.stride[1], *v = u;
                    if (kind_ == Kind::yuv_pairs) {
                        unpack_pairs(isa_, u, chroma_w, second_ ? v_bytes : u_bytes, second_ ? u_bytes : v_bytes);
                        u = u_bytes, v = v_bytes;
                    } else {
                        v = source.plane[2] + row * source.stride[2];
                    }
                    resample(isa_, chroma_, u, to);
                    resample(isa_, chroma_, v, to + plane_);
                });
            }
            const int l = weight != 0 && next != j, c = weight != 0 && (next >> halved) != (j >> halved);
            const Rows r{{luma.rows[0], luma.rows[l]},
                         {chroma.rows[0], chroma.rows[c]},
                         {chroma.rows[0] + plane_, chroma.rows[c] + plane_},
                         int16_t(weight)};
            convert(isa_, r, color_, w_, by_color(levels));
            store_row(dst, top_ + y, levels, turns);
        }
    }

    void run_halves(const Source& source, uint8_t* levels, uint8_t* turns, uint8_t* dst) const {
        const int x = left_pixel_;
        const ptrdiff_t stride = source.stride[0];
        const int row_bytes = in_w_ * (kind_ == Kind::packed || kind_ == Kind::yuv_packed ? channels_ : 1);
        const Halving halving{channels_, order_, halving_mask_.data()};
        uint8_t* const planes[3] = {levels, levels + plane_, levels + 2 * plane_};
        for (int y = 0; y < h_; y++) {
            const uint8_t* row = source.plane[0] + y_index_[y] * stride;
            if (y + 2 < h_)  // a picture comes from memory, which hardware foresees within a page only
                for (int i = 0; i < row_bytes; i += 64) prefetch(row + 4 * stride, i), prefetch(row + 5 * stride, i);
            if (kind_ == Kind::packed) {
                const uint8_t* const two[2] = {row + x * channels_, row + x * channels_ + stride};
                halve(isa_, halving, two, w_, planes);
            } else if (kind_ == Kind::yuv_packed) {
                const uint8_t* const two[2] = {row + 2 * x, row + 2 * x + stride};
                halve_packed(isa_, two, second_, color_, w_, by_color(levels));
            } else {
                const uint8_t* const two[2] = {row + x, row + x + stride};
                const int step = kind_ == Kind::yuv_pairs ? 2 : 1, half = y_index_[y] / 2;
                const uint8_t *u = source.plane[1] + half * source.stride[1] + x / 2 * step, *v = u + 1;
                if (step == 1) v = source.plane[2] + half * source.stride[2] + x / 2;
                else if (second_) std::swap(u, v);
                halve_planes(isa_, two, u, v, step, color_, w_, by_color(levels));
            }
            store_row(dst, top_ + y, levels, turns);
        }
    }

    void run_area(const Source& source, uint8_t* buffer, uint8_t* levels, uint8_t* turns, uint8_t* dst) const {
        static thread_local std::vector<uint32_t> sums;
        const int luma_n = in_w_ * (kind_ == Kind::packed || kind_ == Kind::yuv_packed ? channels_ : 1);
        const int chroma_w = (in_w_ + 1) / 2;
        const size_t behind = 4 * size_t(std::max(filters_[0].most, filters_[2].most));  // read, times 0
        const size_t wanted = size_t(luma_n) + 2 * chroma_w + behind;
        if (sums.size() < wanted) sums.resize(wanted);
        uint32_t *luma = sums.data(), *chroma = luma + luma_n;
        const Filter &x = filters_[0], &y = filters_[1], &cx = filters_[2], &cy = filters_[3];
        const int bits = kind_ == Kind::packed ? 0 : 7;
        const Mean mean(bits, uint64_t(x.total) * y.total);
        int16_t *ys = reinterpret_cast<int16_t*>(buffer), *us = ys + plane_, *vs = us + plane_;
        for (int row = 0; row < h_; row++) {
            sum_rows(isa_, y, row, source.plane[0], source.stride[0], luma_n, luma);
            if (kind_ == Kind::packed) {
                for (int c = 0; c < 3; c++) mean_columns(x, mean, luma + order_[c], channels_, levels + c * plane_);
                store_row(dst, top_ + row, levels, turns);
                continue;
            }
            if (kind_ == Kind::yuv_packed) {
                mean_columns(x, mean, luma + second_, 2, ys);
                mean_columns(cx, mean, luma + 1 - second_, 4, us);
                mean_columns(cx, mean, luma + 3 - second_, 4, vs);
            } else if (kind_ == Kind::yuv_pairs) {
                mean_columns(x, mean, luma, 1, ys);
                sum_rows(isa_, cy, row, source.plane[1], source.stride[1], 2 * chroma_w, chroma);
                mean_columns(cx, mean, chroma + second_, 2, us);
                mean_columns(cx, mean, chroma + 1 - second_, 2, vs);
            } else {
                mean_columns(x, mean, luma, 1, ys);
                sum_rows(isa_, cy, row, source.plane[1], source.stride[1], chroma_w, chroma);
                sum_rows(isa_, cy, row, source.plane[2], source.stride[2], chroma_w, chroma + chroma_w);
                mean_columns(cx, mean, chroma, 1, us);
                mean_columns(cx, mean, chroma + chroma_w, 1, vs);
            }
            convert(isa_, {{ys, ys}, {us, us}, {vs, vs}, 0}, color_, w_, by_color(levels));
            store_row(dst, top_ + row, levels, turns);
        }
    }

    // One row of levels, planes of `plane_` or in turn, into the input, with the padding beside it. Levels are spoiled.
    void store_row(uint8_t* dst, int y, uint8_t* levels, uint8_t* turns) const {
        const int right = out_w_ - left_ - w_;
        if (!nhwc_) {
            for (int c = 0; c < 3; c++) {
                // an engine has used the caches since: lines must come back before they can be written
                if (y + 2 < out_h_) own(dst + ((size_t(c) * out_h_ + y + 2) * out_w_ + left_) * item_, w_ * item_);
                uint8_t* row = dst + (size_t(c) * out_h_ + y) * out_w_ * item_;
                const uint8_t* pad = pad_.data() + size_t(c) * out_w_ * item_;
                std::memcpy(row, pad, size_t(left_) * item_);
                finish_row(isa_, at(c * w_), levels + c * plane_, w_, c, false, row + size_t(left_) * item_);
                std::memcpy(row + size_t(left_ + w_) * item_, pad, size_t(right) * item_);
            }
            return;
        }
        const size_t pixel = size_t(item_) * 3;
        uint8_t *row = dst + size_t(y) * out_w_ * pixel, *values = row + left_ * pixel;
        std::memcpy(row, pad_.data(), left_ * pixel);
        std::memcpy(row + (left_ + w_) * pixel, pad_.data(), right * pixel);
        if (planar_) {
            const uint8_t* planes[3] = {levels, levels + plane_, levels + 2 * plane_};
            if (item_ == 1 && finish_.bytes == Bytes::shifted) return interleave(isa_, planes, finish_.shift, w_, values);
            if (item_ == 1) {
                for (int c = 0; c < 3; c++) finish_row(isa_, finish_, planes[c], w_, c, false, levels + c * plane_);
                return interleave(isa_, planes, 0, w_, values);
            }
            interleave(isa_, planes, 0, w_, turns);
            levels = turns;
        }
        finish_row(isa_, at(0), levels, 3 * w_, 0, true, values);
    }

    // How to finish values from the i-th of a row on.
    Finish at(int i) const {
        Finish f = finish_;
        f.mean = mean_.data() + i, f.std = std_.data() + i, f.inverse = inverse_.data() + i;
        return f;
    }

    void pad_rows(uint8_t* dst, int from, int to) const {
        const int planes = nhwc_ ? 1 : 3;
        const size_t bytes = size_t(out_w_) * item_ * (nhwc_ ? 3 : 1);
        for (int c = 0; c < planes; c++)
            for (int y = from; y < to; y++)
                std::memcpy(dst + (size_t(c) * out_h_ + y) * bytes, pad_.data() + c * bytes, bytes);
    }

    int in_h_, in_w_, channels_, out_h_, out_w_, top_, left_, w_, h_, plane_, safe_, item_, left_pixel_, order_[3];
    bool nhwc_, planar_, halves_ = false, second_;  // second_: the other of two orders, UYVY or NV21
    Kind kind_;
    Isa isa_;
    Finish finish_;
    Color color_;
    Columns luma_, chroma_;
    std::vector<int32_t> y_index_, y_weight_, offset_;
    std::vector<uint32_t> weight_;
    uint8_t shuffle_[16];
    std::vector<float> mean_, std_, inverse_;
    std::vector<uint8_t> table_, pad_, halving_mask_;
    std::vector<Filter> filters_;
};

}  // namespace
}  // namespace edgekit
