// Convolution with block-punched weights (YOLObile, arXiv 2009.05697): 8 filters share which (channel, position) of
// their kernels are kept, so one list of offsets serves 8 dense rows of weights and the inner loop is that of a dense
// product: 8 filters by some vectors of pixels in registers, one step per kept weight, nothing for the others.
//
// Pixels of an output row lie one after the other for each kernel column and each row of a stride: the input is
// copied into such planes first (as often as the kernel is wide, not wide times high), padding included, so that a
// tile of pixels may run over the ends of rows. A 1x1 convolution reads float inputs where they lie.
#include "block_conv/tiles.h"
#include "common.h"
#include "threads.h"

#include <pybind11/stl.h>

#include <array>

namespace edgekit {
namespace {

using namespace block;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<int8_t, py::array::c_style>;
using Codes = py::array_t<uint8_t, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

constexpr int64_t kCache = 192 << 10;  // bytes of input that a chunk of pixels reads: they stay in a second-level cache

const Lanes& lanes_named(const std::string& name) {
    static const std::vector<Lanes> all = all_lanes();
    for (const Lanes& lanes : all)
        if (name == "auto" || name == lanes.name) return lanes;
    throw std::invalid_argument("no such lanes on this machine");
}

// Memory of the calling thread that grows as needed.
uint32_t* scratch(size_t words) {
    thread_local std::vector<uint32_t> memory;
    if (memory.size() < words) memory.resize(words);
    return memory.data();
}

// Sizes of a convolution of one picture. height, width: of the input.
struct Window {
    int channels, height, width, outputs, kh, kw, sh, sw, top, left, out_h, out_w;
};

class Conv {
public:
    // weight: [outputs, channels, kh, kw] of `T`, zeros are left out; channels: in units of one pixel.
    template <class T>
    Conv(const T* weight, const Window& w, int block, const std::string& isa)
        : window(w), lanes(lanes_named(isa)), block_(block), pixels_(int64_t(w.out_h) * w.out_w) {
        constexpr int kIn = int(4 / sizeof(T));  // channels of a pixel
        units_ = (w.channels + kIn - 1) / kIn;
        groups_ = (w.outputs + block - 1) / block;
        place_planes(weight);
        first_.push_back(0);
        for (int g = 0; g < groups_; g++) {
            for (int u = 0; u < units_; u++)
                for (int ky = 0; ky < w.kh; ky++)
                    for (int kx = 0; kx < w.kw; kx++) {
                        std::array<T, kBlock * kIn> tile{};
                        bool any = false;
                        for (int r = 0; r < block && g * block + r < w.outputs; r++)
                            for (int i = 0; i < kIn && u * kIn + i < w.channels; i++) {
                                const T v = weight[((int64_t(g * block + r) * w.channels + u * kIn + i) * w.kh + ky) * w.kw + kx];
                                tile[size_t(r * kIn + i)] = v;
                                any |= v != T(0);
                            }
                        if (!any) continue;
                        offsets_.push_back(offset_of(u, ky, kx));
                        const size_t at = packed_.size(), size = size_t(block) * 4;
                        packed_.resize(at + size);
                        std::memcpy(packed_.data() + at, tile.data(), size);
                    }
            first_.push_back(int64_t(offsets_.size()));
        }
    }

    // Weights that are multiplied, those of whole blocks.
    int64_t kept() const { return int64_t(packed_.size()); }

    const Window window;
    const Lanes& lanes;

protected:
    // The planes of a picture. pixels(unit, first, n, to): n pixels of it, rows one after the other. in_place: where
    // the pixels are those of a picture in memory, else null.
    template <class Pixels>
    const uint32_t* fill(const uint32_t* in_place, uint32_t blank, int threads, Pixels&& pixels) const {
        if (direct_) return in_place;
        const Window& w = window;
        const int64_t size = int64_t(w.height) * w.width;
        // room behind the planes: the vectors of a picture smaller than one reach there
        uint32_t* planes = scratch(size_t(size_ + 64));
        parallel_for(units_, std::max<int64_t>(1, 16384 / size), threads, [&](int64_t begin, int64_t end) {
            thread_local std::vector<uint32_t> picture;
            for (int64_t u = begin; u < end; u++) {
                const uint32_t* from = in_place ? in_place + u * size : nullptr;
                const int64_t middle = w.left < w.kw ? base_[size_t(w.left) * w.sh] : -1;
                if (!from && whole_ && middle >= 0) {  // made where it is needed, the other planes are copies
                    uint32_t* to = planes + middle + (u * rows_of(0) + w.top) * w.out_w;
                    pixels(u, 0, std::min<int64_t>(w.height, rows_of(0) - w.top) * w.width, to);
                    from = to;
                } else if (!from) {
                    if (picture.size() < size_t(size)) picture.resize(size_t(size));
                    pixels(u, 0, size, picture.data());
                    from = picture.data();
                }
                for (int kx = 0; kx < w.kw; kx++)
                    for (int phase = 0; phase < std::min(w.sh, w.kh); phase++) {
                        const int64_t base = base_[size_t(kx * w.sh + phase)];
                        if (base < 0) continue;
                        uint32_t* to = planes + base + u * rows_of(phase) * w.out_w;
                        whole_ ? shift(from, kx - w.left, blank, to) : pick(from, kx, phase, blank, to);
                    }
            }
        });
        return planes;
    }

    // tile(group, run, vectors) for every group of filters and every tile of pixels.
    template <class Tile>
    void tiles(const uint32_t* planes, int threads, Tile&& tile) const {
        const int64_t width = lanes.width, most = block_ == 1 ? lanes.most : lanes.wide;
        const int64_t vectors = std::max<int64_t>(1, (pixels_ + width - 1) / width);
        const int64_t count = (vectors + most - 1) / most;
        const int64_t bytes = most * width * 4 * std::max<int64_t>(1, int64_t(units_) * window.kw * window.kh);
        const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(count, kCache / bytes));
        const int64_t chunks = (count + chunk - 1) / chunk;
        parallel_for(chunks * groups_, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int g = int(item % groups_);
                Run run{};
                run.x = planes;
                run.offsets = offsets_.data() + first_[size_t(g)];
                run.count = int(first_[size_t(g) + 1] - first_[size_t(g)]);
                run.w = packed_.data() + size_t(first_[size_t(g)]) * size_t(block_) * 4;
                run.rows = std::min(block_, window.outputs - g * block_);
                const int64_t from = item / groups_ * chunk, to = std::min(count, from + chunk);
                for (int64_t t = from; t < to; t++) {
                    // as even as can be: 7 vectors as 3, 2, 2
                    const int64_t first = vectors * t / count, last = vectors * (t + 1) / count;
                    for (int64_t v = first; v < last; v++)  // the last one ends with the picture
                        run.at[v - first] = std::max<int64_t>(0, std::min(v * width, pixels_ - width));
                    tile(g, run, int(last - first));
                }
            }
        });
    }

    int64_t pixels() const { return pixels_; }  // of the output
    int block() const { return block_; }

private:
    // A plane of a convolution that leaves the picture's width as it is: the picture, `by` pixels on.
    void shift(const uint32_t* from, int by, uint32_t blank, uint32_t* to) const {
        const Window& w = window;
        const int count = rows_of(0), rows = std::min(w.height, count - w.top);
        const int64_t n = int64_t(rows) * w.width, first = std::max(0, -by), last = n - std::max(0, by);
        std::fill_n(to, int64_t(w.top) * w.width, blank);
        uint32_t* inside = to + int64_t(w.top) * w.width;
        if (last > first && inside + first != from + first + by)
            std::memcpy(inside + first, from + first + by, sizeof(uint32_t) * size_t(last - first));
        const int edge = std::min(std::abs(by), w.width), at = by < 0 ? 0 : w.width - edge;
        if (by != 0)
            for (int r = 0; r < rows; r++) std::fill_n(inside + int64_t(r) * w.width + at, edge, blank);
        std::fill(inside + n, to + int64_t(count) * w.width, blank);
    }

    // The plane of a kernel column and a row of the stride, in general.
    void pick(const uint32_t* from, int kx, int phase, uint32_t blank, uint32_t* to) const {
        const Window& w = window;
        const int start = kx - w.left;  // of the input, for the first output
        const int first = std::min(w.out_w, start < 0 ? (-start + w.sw - 1) / w.sw : 0);
        const int end = std::max(first, std::min(w.out_w, (w.width - start + w.sw - 1) / w.sw));
        // rows of the plane that lie in the picture
        const int count = rows_of(phase), above = w.top - phase;
        const int low = std::min(count, above > 0 ? (above + w.sh - 1) / w.sh : 0);
        const int high = std::max(low, std::min(count, (w.height + above + w.sh - 1) / w.sh));
        std::fill_n(to, int64_t(low) * w.out_w, blank);
        std::fill(to + int64_t(high) * w.out_w, to + int64_t(count) * w.out_w, blank);
        for (int r = low; r < high && first > 0; r++) std::fill_n(to + int64_t(r) * w.out_w, first, blank);
        for (int r = low; r < high && end < w.out_w; r++) std::fill_n(to + int64_t(r) * w.out_w + end, w.out_w - end, blank);
        if (end == first || high == low) return;
        const int64_t y = int64_t(low) * w.sh - above;
        lanes.pick(from + y * w.width + start + int64_t(first) * w.sw, int64_t(w.sh) * w.width, w.sw, end - first,
                   high - low, to + int64_t(low) * w.out_w + first, w.out_w);
    }

    int rows_of(int phase) const { return window.out_h + (window.kh - 1 - phase) / window.sh; }

    int32_t offset_of(int unit, int ky, int kx) const {
        if (direct_) return int32_t(int64_t(unit) * pixels_);
        const int phase = ky % window.sh;
        const int64_t row = int64_t(unit) * rows_of(phase) + ky / window.sh;
        return int32_t(base_[size_t(kx * window.sh + phase)] + row * window.out_w);
    }

    template <class T>
    void place_planes(const T* weight) {
        const Window& w = window;
        direct_ = sizeof(T) == 4 && w.kh == 1 && w.kw == 1 && w.sh == 1 && w.sw == 1 && w.top == 0 && w.left == 0 &&
                  w.out_h == w.height && w.out_w == w.width && pixels_ >= lanes.width;
        if (direct_) return;
        whole_ = w.sh == 1 && w.sw == 1 && w.out_w == w.width && rows_of(0) > w.top;
        base_.assign(size_t(w.kw) * w.sh, -1);
        for (int kx = 0; kx < w.kw; kx++)
            for (int ky = 0; ky < w.kh; ky++) {
                int64_t& base = base_[size_t(kx * w.sh + ky % w.sh)];
                if (base >= 0) continue;
                bool any = false;
                for (int64_t f = 0; f < int64_t(w.outputs) * w.channels && !any; f++)
                    for (int y = ky % w.sh; y < w.kh; y += w.sh) any |= weight[(f * w.kh + y) * w.kw + kx] != T(0);
                if (!any) continue;  // a column of zeros needs no plane
                base = size_;
                size_ += int64_t(units_) * rows_of(ky % w.sh) * w.out_w;
            }
        check(size_ < INT32_MAX, "block_conv planes");
    }

    int block_, units_ = 0, groups_ = 0;
    int64_t pixels_, size_ = 0;
    bool direct_ = false, whole_ = false;
    std::vector<int64_t> base_;     // [kw][phase]: where a plane begins, -1 = not needed
    std::vector<int32_t> offsets_;  // of all groups
    std::vector<int64_t> first_;    // [groups + 1]
    std::vector<uint8_t> packed_;
};

Window window_of(const std::vector<py::ssize_t>& shape, const std::array<int, 2>& size, const std::array<int, 2>& stride,
                 const std::array<int, 4>& padding) {
    Window w{};
    w.outputs = int(shape[0]), w.channels = int(shape[1]), w.kh = int(shape[2]), w.kw = int(shape[3]);
    w.height = size[0], w.width = size[1], w.sh = stride[0], w.sw = stride[1], w.top = padding[0], w.left = padding[1];
    w.out_h = (w.height + w.top + padding[2] - w.kh) / w.sh + 1;
    w.out_w = (w.width + w.left + padding[3] - w.kw) / w.sw + 1;
    return w;
}

template <class Array>
std::vector<py::ssize_t> shape_of(const Array& a) {
    check(a.ndim() == 4, "block_conv weights");
    return {a.shape(), a.shape() + 4};
}

class FloatConv : public Conv {
public:
    FloatConv(const Floats& weight, const Floats& bias, const std::array<int, 2>& size, const std::array<int, 2>& stride,
              const std::array<int, 4>& padding, bool relu, int block, const std::string& isa)
        : Conv(weight.data(), window_of(shape_of(weight), size, stride, padding), block, isa), bias_(copy(bias)), relu_(relu) {
        check(bias.size() == window.outputs && (block == 1 || block == kBlock), "block_conv bias");
        bias_.resize(bias_.size() + kBlock);
    }

    void run(const Floats& x, Floats out, int threads) const {
        const Window& w = window;
        check(x.size() == int64_t(w.channels) * w.height * w.width && out.size() == w.outputs * pixels(), "block_conv arrays");
        const float* from = x.data();
        float* to = out.mutable_data();
        py::gil_scoped_release release;
        static_assert(sizeof(float) == sizeof(uint32_t), "a pixel is a float");
        const uint32_t* planes = fill(reinterpret_cast<const uint32_t*>(from), 0, threads, [](int64_t, int64_t, int64_t, uint32_t*) {});
        const bool small = pixels() < lanes.width;
        tiles(planes, threads, [&](int g, const Run& run, int vectors) {
            float* rows[kBlock];
            float few[kBlock][64];
            for (int r = 0; r < run.rows; r++) rows[r] = small ? few[r] : to + int64_t(g * block() + r) * pixels();
            lanes.floats(run, {bias_.data() + g * block(), relu_, rows}, block(), vectors);
            for (int r = 0; r < run.rows && small; r++)
                std::copy_n(few[r], pixels(), to + int64_t(g * block() + r) * pixels());
        });
    }

private:
    std::vector<float> bias_;
    bool relu_;
};

class ByteConv : public Conv {
public:
    // bias: in units of scale_x * scale_w. scale: scale_x * scale_w / scale_y per filter.
    ByteConv(const Bytes& weight, const Ints& bias, const Floats& scale, const std::array<int, 2>& size,
             const std::array<int, 2>& stride, const std::array<int, 4>& padding, bool relu, int zero_x, int zero_y,
             const std::string& isa)
        : Conv(weight.data(), window_of(shape_of(weight), size, stride, padding), kBlock, isa), bias_(copy(bias)),
          scale_(copy(scale)), zero_x_(zero_x), zero_y_(zero_y), low_(relu ? 0 : -zero_y) {
        check(bias.size() == window.outputs && scale.size() == window.outputs, "block_conv scales");
        const int64_t filter = int64_t(window.channels) * window.kh * window.kw;
        for (int o = 0; o < window.outputs; o++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < filter; i++) sum += weight.data()[o * filter + i];
            bias_[size_t(o)] -= sum * (lanes.flipped ? zero_x - 128 : zero_x);
        }
        bias_.resize(bias_.size() + kBlock);
    }

    void run(const Codes& x, Codes out, int threads) const {
        const Window& w = window;
        check(x.size() == int64_t(w.channels) * w.height * w.width && out.size() == w.outputs * pixels(), "block_conv arrays");
        const uint8_t* from = x.data();
        uint8_t* to = out.mutable_data();
        const int64_t plane = int64_t(w.height) * w.width;
        const uint8_t flip = lanes.flipped ? 128 : 0;
        py::gil_scoped_release release;
        const uint32_t blank = uint32_t(uint8_t(zero_x_ ^ flip)) * 0x01010101u;
        const uint32_t* planes = fill(nullptr, blank, threads, [&](int64_t u, int64_t first, int64_t n, uint32_t* to_pixels) {
            const uint8_t* rows[4];
            for (int i = 0; i < 4; i++)  // channels that there are not meet weights of zero
                rows[i] = from + std::min<int64_t>(u * 4 + i, w.channels - 1) * plane + first;
            interleave(rows, n, flip, to_pixels);
        });
        const bool small = pixels() < lanes.width;
        tiles(planes, threads, [&](int g, const Run& run, int vectors) {
            uint8_t* rows[kBlock];
            uint8_t few[kBlock][64];
            for (int r = 0; r < run.rows; r++) rows[r] = small ? few[r] : to + int64_t(g * kBlock + r) * pixels();
            lanes.bytes(run, {bias_.data() + g * kBlock, scale_.data() + g * kBlock, float(low_), float(255 - zero_y_), zero_y_, rows}, vectors);
            for (int r = 0; r < run.rows && small; r++)
                std::copy_n(few[r], pixels(), to + int64_t(g * kBlock + r) * pixels());
        });
    }

private:
    std::vector<int32_t> bias_;
    std::vector<float> scale_;
    int zero_x_, zero_y_, low_;
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(block_conv, m) {
    using namespace edgekit;
    py::class_<FloatConv>(m, "BlockConv")
        .def(py::init<const Floats&, const Floats&, const std::array<int, 2>&, const std::array<int, 2>&,
                      const std::array<int, 4>&, bool, int, const std::string&>(),
             py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("size"), py::arg("stride"),
             py::arg("padding"), py::arg("relu"), py::arg("block"), py::arg("isa"))
        .def("run", &FloatConv::run, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("threads"))
        .def_property_readonly("kept", [](const FloatConv& c) { return c.kept() / 4; });
    py::class_<ByteConv>(m, "BlockConv8")
        .def(py::init<const Bytes&, const Ints&, const Floats&, const std::array<int, 2>&, const std::array<int, 2>&,
                      const std::array<int, 4>&, bool, int, int, const std::string&>(),
             py::arg("weight").noconvert(), py::arg("bias").noconvert(), py::arg("scale").noconvert(), py::arg("size"),
             py::arg("stride"), py::arg("padding"), py::arg("relu"), py::arg("zero_x"), py::arg("zero_y"), py::arg("isa"))
        .def("run", &ByteConv::run, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("threads"))
        .def_property_readonly("kept", [](const ByteConv& c) { return c.kept(); });
    m.def("block_isas", [] {
        py::list list;
        for (const block::Lanes& lanes : block::all_lanes()) list.append(lanes.name);
        return list;
    });
}
