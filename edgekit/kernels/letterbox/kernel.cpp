// Letterbox in one pass over the picture. reference.py defines the arithmetic; every code path here
// gives its bits: integers up to the 8-bit level, then values that are looked up or computed in float32
// (the module is compiled with contraction off).
//
// Row by row, as cv2 does it: the source rows of an output row are resampled horizontally into 16-bit
// row buffers (kept while the next output row needs them), then blended vertically, converted, and stored
// as the network's values in its layout, so that no intermediate picture exists. packed.h, yuv.h and area.h
// make levels, finish.h stores them.
#include "letterbox/area.h"
#include "letterbox/packed.h"
#include "letterbox/yuv_simd.h"

#include <pybind11/stl.h>

#include <string>

namespace edgekit {
namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Raw = py::array_t<uint8_t, py::array::c_style>;

enum class Kind { packed, yuv_packed, yuv_pairs, yuv_planes };

// Where the planes of a picture begin and how far apart their rows lie.
struct Source {
    const uint8_t* plane[3];
    ptrdiff_t stride[3];
};

class Letterbox {
public:
    Letterbox(const std::string& format, std::pair<int, int> in_size, std::pair<int, int> out_size,
              std::pair<int, int> corner, bool nhwc, const std::string& dtype, const Ints& x_index,
              const Ints& x_weight, const Ints& y_index, const Ints& y_weight, std::tuple<int, int, int> order,
              const Ints& color, const std::vector<std::tuple<Ints, Ints, int>>& filters, const Floats& mean, const Floats& std, const Raw& values, const Raw& pad,
              const std::string& isa)
        : y_index_(copy(y_index)), y_weight_(copy(y_weight)), table_(copy(values)) {
        std::tie(in_h_, in_w_) = in_size;
        std::tie(out_h_, out_w_) = out_size;
        std::tie(top_, left_) = corner;
        std::tie(order_[0], order_[1], order_[2]) = order;
        Isa best = detect_isa();
#if EDGEKIT_HAS_AVX2
        if (!__builtin_cpu_supports("fma")) best = Isa::portable;
#endif
        check(isa == "auto" || isa == "portable" || isa == isa_name(best), "letterbox isa");
        isa_ = isa == "portable" ? Isa::portable : best;
        nhwc_ = nhwc;
        set_format(format);
        w_ = int(x_index.size());
        h_ = int(y_index.size());
        check(x_weight.size() == w_ && y_weight.size() == h_, "letterbox tables");
        check(top_ >= 0 && left_ >= 0 && top_ + h_ <= out_h_ && left_ + w_ <= out_w_, "letterbox placement");
        const int one = kind_ == Kind::packed ? 1 << 11 : 1 << 15;
        for (int x = 0; x < w_; x++) {
            const int index = x_index.data()[x], weight = x_weight.data()[x];
            check(index >= 0 && index < in_w_ && weight >= 0 && weight < one, "letterbox columns");
        }
        for (int y = 0; y < h_; y++)
            check(y_index_[y] >= 0 && y_index_[y] < in_h_ && y_weight_[y] >= 0 && y_weight_[y] < one, "letterbox rows");
        set_filters(filters);
        halves_ = x_index.data()[0] % 2 == 0 && y_index_[0] % 2 == 0;
        for (int x = 0; x < w_; x++)
            halves_ = halves_ && x_weight.data()[x] == one / 2 && x_index.data()[x] == x_index.data()[0] + 2 * x;
        for (int y = 0; y < h_; y++)
            halves_ = halves_ && y_weight_[y] == one / 2 && y_index_[y] == y_index_[0] + 2 * y;
        // one output pixel of a larger picture may look the same to bilinear taps
        if (!filters_.empty()) halves_ = halves_ && filters_[0].total == 2 && filters_[1].total == 2;
        left_pixel_ = x_index.data()[0];
        set_values(dtype, mean, std, pad);
        plane_ = (w_ + 63) / 64 * 64;
        if (kind_ == Kind::packed) {
            set_taps(x_index, x_weight);
        } else {
            check(color.size() == 7, "letterbox color");
            const int32_t* c = color.data();
            color_ = {int16_t(c[0]), int16_t(c[1]), int16_t(c[2]), int16_t(c[3]), int16_t(c[4]), int16_t(c[5])};
            set_columns(luma_, x_index, x_weight, 0, in_w_);
            set_columns(chroma_, x_index, x_weight, 1, (in_w_ + 1) / 2);
        }
    }

    void run(const py::tuple& planes, py::array out, bool padded) const {
        const Source source = source_of(planes);
        check(out.nbytes() == py::ssize_t(item_) * 3 * out_h_ * out_w_, "letterbox out");
        uint8_t* dst = static_cast<uint8_t*>(out.mutable_data());
        py::gil_scoped_release release;
        run(source, dst, padded);
    }

    // Where `run` would read and write: for tests that no copy lies in between.
    std::pair<std::vector<uintptr_t>, uintptr_t> addresses(const py::tuple& planes, const py::array& out) const {
        const Source source = source_of(planes);
        std::vector<uintptr_t> from;
        for (size_t i = 0; i < planes.size(); i++) from.push_back(reinterpret_cast<uintptr_t>(source.plane[i]));
        return {from, reinterpret_cast<uintptr_t>(out.data())};
    }

private:
    void set_format(const std::string& format) {
        const bool yuyv = format == "yuyv", uyvy = format == "uyvy", nv12 = format == "nv12", nv21 = format == "nv21";
        kind_ = yuyv || uyvy ? Kind::yuv_packed : nv12 || nv21 ? Kind::yuv_pairs
                : format == "i420" ? Kind::yuv_planes : Kind::packed;
        second_ = uyvy || nv21;
        channels_ = yuyv || uyvy ? 2 : format == "grey" ? 1 : format == "bgra" || format == "rgba" ? 4 : 3;
        for (int c = 0; c < 3; c++)
            check(order_[c] >= 0 && order_[c] < (kind_ == Kind::packed ? channels_ : 3), "letterbox channel order");
    }

    void set_values(const std::string& dtype, const Floats& mean, const Floats& std, const Raw& pad) {
        finish_.type = dtype == "float32" ? Out::f32 : dtype == "float16" ? Out::f16 : Out::u8;
        item_ = finish_.type == Out::f32 ? 4 : finish_.type == Out::f16 ? 2 : 1;
        check(mean.size() == 3 && std.size() == 3, "letterbox normalisation");
        check(pad.size() == 3 * item_ && table_.size() == size_t(3) * 256 * item_, "letterbox values");
        finish_.table = table_.data();
        finish_.bytes = Bytes::shifted;
        finish_.shift = table_[0];
        if (item_ == 1)
            for (int i = 0; i < 768; i++)
                if (table_[i] != uint8_t(i % 256 + table_[0])) finish_.bytes = Bytes::looked_up;
        bool plain = true, refined = true;
        for (int c = 0; c < 3; c++) {
            plain = plain && mean.data()[c] == 0.0f && std.data()[c] == 1.0f;
            refined = refined && refined_is_exact(mean.data()[c], std.data()[c]);
        }
        finish_.arithmetic = plain ? Arithmetic::plain : refined ? Arithmetic::refined : Arithmetic::divided;
        // per value of an output row: [w][3], or per plane the same value all along
        for (int i = 0; i < 3 * w_; i++) {
            const int c = nhwc_ ? i % 3 : i / w_;
            mean_.push_back(mean.data()[c]);
            std_.push_back(std.data()[c]);
            inverse_.push_back(1.0f / std.data()[c]);
        }
        for (int i = 0; i < 3 * out_w_; i++) {
            const uint8_t* value = pad.data() + (nhwc_ ? i % 3 : i / out_w_) * item_;
            pad_.insert(pad_.end(), value, value + item_);
        }
        // a table per channel is looked up plane by plane
        planar_ = !nhwc_ || kind_ != Kind::packed || halves_ || !filters_.empty() || (item_ == 1 && finish_.bytes == Bytes::looked_up);
    }

    // x and y, of luma (all channels) and of chroma.
    void set_filters(const std::vector<std::tuple<Ints, Ints, int>>& filters) {
        if (filters.empty()) return;
        check(filters.size() == 4, "letterbox filters");
        const bool square = kind_ == Kind::yuv_pairs || kind_ == Kind::yuv_planes;
        const int sources[4] = {in_w_, in_h_, (in_w_ + 1) / 2, square ? (in_h_ + 1) / 2 : in_h_};
        for (int i = 0; i < 4; i++) {
            const auto& [start, weight, total] = filters[i];
            filters_.emplace_back(start, weight, total, i % 2 ? h_ : w_, sources[i]);
        }
    }

    void set_taps(const Ints& x_index, const Ints& x_weight) {
        safe_ = w_;
        for (int x = 0; x < w_; x++) {
            const int index = x_index.data()[x], weight = x_weight.data()[x];
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

    void set_columns(Columns& columns, const Ints& x_index, const Ints& x_weight, int halved, int row_bytes) const {
        for (int x = 0; x < w_; x++) {
            const int index = x_index.data()[x];
            columns.add(index >> halved, std::min(index + 1, in_w_ - 1) >> halved, x_weight.data()[x]);
        }
        columns.finish(row_bytes);
    }

    Source source_of(const py::tuple& planes) const {
        static const size_t counts[] = {1, 1, 2, 3};
        const int half_h = (in_h_ + 1) / 2, half_w = (in_w_ + 1) / 2;
        check(planes.size() == counts[int(kind_)], "letterbox planes");
        Source source{};
        for (size_t i = 0; i < planes.size(); i++) {
            check(py::isinstance<py::array_t<uint8_t>>(planes[i]), "letterbox plane");
            const py::array plane = py::reinterpret_borrow<py::array>(planes[i]);
            const bool inner = kind_ == Kind::packed || kind_ == Kind::yuv_packed || (kind_ == Kind::yuv_pairs && i == 1);
            const int bytes = kind_ == Kind::yuv_pairs ? 2 : channels_;
            const int h = i == 0 ? in_h_ : half_h, w = i == 0 ? in_w_ : half_w;
            check(plane.ndim() == (inner ? 3 : 2) && plane.shape(0) == h && plane.shape(1) == w, "letterbox plane shape");
            check(!inner || (plane.shape(2) == bytes && (bytes == 1 || plane.strides(2) == 1)), "letterbox plane bytes");
            check(w == 1 || plane.strides(1) == (inner ? bytes : 1), "letterbox plane columns");
            source.plane[i] = static_cast<const uint8_t*>(plane.data());
            source.stride[i] = plane.strides(0);
        }
        return source;
    }

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

EDGEKIT_KERNEL(letterbox, m) {
    using edgekit::Letterbox;
    py::class_<Letterbox>(m, "Letterbox")
        .def(py::init<const std::string&, std::pair<int, int>, std::pair<int, int>, std::pair<int, int>, bool,
                      const std::string&, const edgekit::Ints&, const edgekit::Ints&, const edgekit::Ints&,
                      const edgekit::Ints&, std::tuple<int, int, int>, const edgekit::Ints&,
                      const std::vector<std::tuple<edgekit::Ints, edgekit::Ints, int>>&, const edgekit::Floats&, const edgekit::Floats&, const edgekit::Raw&, const edgekit::Raw&, const std::string&>(),
             py::kw_only(), py::arg("format"), py::arg("in_size"), py::arg("out_size"), py::arg("corner"),
             py::arg("nhwc"), py::arg("dtype"), py::arg("x_index"), py::arg("x_weight"), py::arg("y_index"),
             py::arg("y_weight"), py::arg("order"), py::arg("color"), py::arg("filters"), py::arg("mean"), py::arg("std"),
             py::arg("values"), py::arg("pad"), py::arg("isa"))
        .def("run", py::overload_cast<const py::tuple&, py::array, bool>(&Letterbox::run, py::const_),
             py::arg("planes"), py::arg("out").noconvert(), py::arg("padded"))
        .def("addresses", &Letterbox::addresses, py::arg("planes"), py::arg("out").noconvert());
}
