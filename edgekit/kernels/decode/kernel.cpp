// The decoder for Python: arrays in, arrays out, the work is decoder.h's.
#include "common.h"
#include "decode/decoder.h"

#include <string>

namespace edgekit {
namespace {

Grid read_grid(const py::dict& d) {
    const auto integer = [&](const char* key) { return d[key].cast<int>(); };
    const std::string name = d["family"].cast<std::string>();
    Grid g{};
    g.family = name == "yolox"        ? Family::yolox
               : name == "yolov5"     ? Family::yolov5
               : name == "fastestdet" ? Family::fastestdet
               : name == "rows"       ? Family::rows
                                      : Family::distribution;
    g.height = integer("height"), g.width = integer("width");
    g.bins = integer("bins"), g.num_classes = integer("num_classes");
    g.stride = d["stride"].cast<double>(), g.offset = d["offset"].cast<double>();
    for (int k = 0; k < 2; k++) {
        g.anchor[k] = d["anchor"].cast<py::tuple>()[k].cast<double>();
        g.scale[k] = d["scale"].cast<py::tuple>()[k].cast<double>();
    }
    for (int k = 0; k < 4; k++) g.box[k] = d["box"].cast<py::tuple>()[k].cast<int>();
    g.box_tensor = integer("box_tensor");
    g.class_tensor = integer("class_tensor"), g.class_start = integer("class_start");
    g.object_tensor = integer("object_tensor"), g.object_start = integer("object_start");
    g.score = integer("score"), g.label = integer("label");
    g.corners = d["corners"].cast<bool>();
    return g;
}

class PyDecoder {
public:
    PyDecoder(const py::list& grids, const std::string& isa) : decoder_(read_grids(grids), choose(isa)) {}

    // The tensors of the next calls, [1, C, H, W] float32 with any strides; they are held until the next bind.
    void bind(const py::list& tensors) {
        std::vector<View> views;
        for (const py::handle& item : tensors) {
            const py::array a = py::reinterpret_borrow<py::array>(item);
            check(a.ndim() == 4 && a.itemsize() == 4, "decode tensor");
            views.push_back({static_cast<const char*>(a.data()), a.strides(1), a.strides(2), a.strides(3),
                             int(a.shape(1)), int(a.shape(2)), int(a.shape(3))});
        }
        held_ = tensors;
        decoder_.bind(std::move(views));
    }

    // Candidates: boxes [n, 4], scores [n], classes [n].
    py::tuple run(float threshold, float low_object, float low_class, bool all_classes) {
        int n = 0;
        {
            py::gil_scoped_release release;
            n = decoder_.decode({threshold, low_object, low_class, all_classes});
        }
        py::array_t<float> boxes({n, 4}), scores(n);
        py::array_t<int32_t> classes(n);
        std::copy_n(decoder_.boxes(), size_t(4) * n, boxes.mutable_data());
        std::copy_n(decoder_.scores(), n, scores.mutable_data());
        std::copy_n(decoder_.classes(), n, classes.mutable_data());
        return py::make_tuple(boxes, scores, classes);
    }

    // The boxes that nms keeps, in pixels of the picture: (box - offset) / scale, within 0..limit where `clip`.
    // mapping: [3, 4] offset, scale, limit.
    py::tuple detect(float threshold, float low_object, float low_class, bool all_classes, float iou_threshold,
                     int max_detections, int max_candidates, const py::array_t<float, py::array::c_style>& mapping,
                     bool clip) {
        check(mapping.size() == 12, "decode mapping");
        ToPicture to;
        std::copy_n(mapping.data(), 4, to.offset);
        std::copy_n(mapping.data() + 4, 4, to.scale);
        std::copy_n(mapping.data() + 8, 4, to.limit);
        to.clip = clip;
        int n = 0;
        {
            py::gil_scoped_release release;
            decoder_.decode({threshold, low_object, low_class, all_classes});
            n = decoder_.suppress(iou_threshold, max_detections, max_candidates);
        }
        check(n >= 0, "decode class");
        const int32_t* kept = decoder_.kept();
        py::array_t<float> boxes({n, 4}), scores(n);
        py::array_t<int32_t> classes(n);
        float *box = boxes.mutable_data(), *score = scores.mutable_data();
        int32_t* label = classes.mutable_data();
        for (int i = 0; i < n; i++) {
            decoder_.place(kept[i], to, box + 4 * i);
            score[i] = decoder_.scores()[kept[i]], label[i] = decoder_.classes()[kept[i]];
        }
        return py::make_tuple(boxes, scores, classes);
    }

private:
    static std::vector<Grid> read_grids(const py::list& list) {
        std::vector<Grid> grids;
        for (const py::handle& grid : list) grids.push_back(read_grid(grid.cast<py::dict>()));
        return grids;
    }

    static Isa choose(const std::string& isa) {
        const Isa best = detect_isa();
        check(isa == "auto" || isa == "portable" || isa == isa_name(best), "decode isa");
        return isa == "portable" ? Isa::portable : best;
    }

    Decoder decoder_;
    py::list held_;
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(decode, m) {
    using Decoder = edgekit::PyDecoder;
    py::class_<Decoder>(m, "Decoder")
        .def(py::init<const py::list&, const std::string&>(), py::arg("grids"), py::arg("isa"))
        .def("bind", &Decoder::bind, py::arg("tensors"))
        .def("run", &Decoder::run, py::arg("threshold"), py::arg("low_object"), py::arg("low_class"),
             py::arg("all_classes"))
        .def("detect", &Decoder::detect, py::arg("threshold"), py::arg("low_object"), py::arg("low_class"),
             py::arg("all_classes"), py::arg("iou_threshold"), py::arg("max_detections"), py::arg("max_candidates"),
             py::arg("mapping").noconvert(), py::arg("clip"));
}
