// letterbox for Python: arrays in, the work is letterbox.h's.
#include "common.h"
#include "letterbox/letterbox.h"

#include <pybind11/stl.h>

#include <string>

namespace edgekit {
namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Raw = py::array_t<uint8_t, py::array::c_style>;

Pixel pixel_of(const std::string& name) {
    static const char* const names[] = {"bgr", "rgb", "bgra", "rgba", "grey", "yuyv", "uyvy", "nv12", "nv21", "i420"};
    for (int i = 0; i < 10; i++)
        if (name == names[i]) return Pixel(i);
    throw std::logic_error("letterbox format");
}

class PyLetterbox {
public:
    PyLetterbox(const std::string& format, std::pair<int, int> in_size, std::pair<int, int> out_size,
                std::pair<int, int> corner, bool nhwc, const std::string& dtype, const Ints& x_index,
                const Ints& x_weight, const Ints& y_index, const Ints& y_weight, std::tuple<int, int, int> order,
                const Ints& color, const std::vector<std::tuple<Ints, Ints, int>>& filters, const Floats& mean,
                const Floats& std, const Raw& values, const Raw& pad, const std::string& isa)
        : kernel_(
              [&] {
                  LetterboxTables t;
                  t.format = pixel_of(format);
                  std::tie(t.in_h, t.in_w) = in_size;
                  std::tie(t.out_h, t.out_w) = out_size;
                  std::tie(t.top, t.left) = corner;
                  std::tie(t.order[0], t.order[1], t.order[2]) = order;
                  t.nhwc = nhwc;
                  t.type = dtype == "float32" ? Out::f32 : dtype == "float16" ? Out::f16 : Out::u8;
                  t.x_index = copy(x_index), t.x_weight = copy(x_weight);
                  t.y_index = copy(y_index), t.y_weight = copy(y_weight);
                  t.color = copy(color);
                  for (const auto& [start, weight, total] : filters) {
                      check(weight.ndim() == 2 && weight.shape(0) == start.size(), "letterbox filter");
                      t.filters.push_back({copy(start), copy(weight), int(weight.shape(1)), total});
                  }
                  check(mean.size() == 3 && std.size() == 3, "letterbox normalisation");
                  std::copy_n(mean.data(), 3, t.mean), std::copy_n(std.data(), 3, t.std);
                  t.values = copy(values), t.pad = copy(pad);
                  return t;
              }(),
              choose(isa)) {}

    void run(const py::tuple& planes, py::array out, bool padded) const {
        const Source source = source_of(planes);
        check(size_t(out.nbytes()) == kernel_.out_bytes(), "letterbox out");
        uint8_t* dst = static_cast<uint8_t*>(out.mutable_data());
        py::gil_scoped_release release;
        kernel_.run(source, dst, padded);
    }

    // Where `run` would read and write: for tests that no copy lies in between.
    std::pair<std::vector<uintptr_t>, uintptr_t> addresses(const py::tuple& planes, const py::array& out) const {
        const Source source = source_of(planes);
        std::vector<uintptr_t> from;
        for (size_t i = 0; i < planes.size(); i++) from.push_back(reinterpret_cast<uintptr_t>(source.plane[i]));
        return {from, reinterpret_cast<uintptr_t>(out.data())};
    }

private:
    static Isa choose(const std::string& isa) {
        const Isa best = Letterbox::best_isa();
        check(isa == "auto" || isa == "portable" || isa == isa_name(best), "letterbox isa");
        return isa == "portable" ? Isa::portable : best;
    }

    Source source_of(const py::tuple& planes) const {
        static const size_t counts[] = {1, 1, 2, 3};
        const Kind kind = kernel_.kind();
        const int in_h = kernel_.in_height(), in_w = kernel_.in_width(), half_h = (in_h + 1) / 2, half_w = (in_w + 1) / 2;
        check(planes.size() == counts[int(kind)], "letterbox planes");
        Source source{};
        for (size_t i = 0; i < planes.size(); i++) {
            check(py::isinstance<py::array_t<uint8_t>>(planes[i]), "letterbox plane");
            const py::array plane = py::reinterpret_borrow<py::array>(planes[i]);
            const bool inner = kind == Kind::packed || kind == Kind::yuv_packed || (kind == Kind::yuv_pairs && i == 1);
            const int bytes = kind == Kind::yuv_pairs ? 2 : kernel_.channels();
            const int h = i == 0 ? in_h : half_h, w = i == 0 ? in_w : half_w;
            check(plane.ndim() == (inner ? 3 : 2) && plane.shape(0) == h && plane.shape(1) == w, "letterbox plane shape");
            check(!inner || (plane.shape(2) == bytes && (bytes == 1 || plane.strides(2) == 1)), "letterbox plane bytes");
            check(w == 1 || plane.strides(1) == (inner ? bytes : 1), "letterbox plane columns");
            source.plane[i] = static_cast<const uint8_t*>(plane.data());
            source.stride[i] = plane.strides(0);
        }
        return source;
    }

    Letterbox kernel_;
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(letterbox, m) {
    using Letterbox = edgekit::PyLetterbox;
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
