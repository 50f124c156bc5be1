// nms as a function of its own; detectors run it inside the decoder's call (decode/kernel.cpp).
#include "common.h"
#include "nms/nms.h"

EDGEKIT_KERNEL(nms, m) {
    m.def(
        "nms",
        [](const py::array_t<float, py::array::c_style>& boxes, const py::array_t<float, py::array::c_style>& scores,
           const py::array_t<int32_t, py::array::c_style>& classes, float threshold, int max_detections,
           int max_candidates, int max_class, py::array_t<int32_t, py::array::c_style> out) {
            const int n = int(scores.size());
            edgekit::check(boxes.size() == 4 * py::ssize_t(n) && classes.size() == n, "nms arrays");
            edgekit::check(out.size() >= std::min(n, max_detections), "nms out");
            const float *b = boxes.data(), *s = scores.data();
            const int32_t* c = classes.data();
            int32_t* o = out.mutable_data();
            py::gil_scoped_release release;
            static thread_local edgekit::Nms nms(edgekit::detect_isa());
            const int count = nms.run(b, s, c, n, threshold, max_detections, max_candidates, max_class);
            if (count > 0) std::copy_n(nms.kept(), count, o);
            return count;
        },
        py::arg("boxes").noconvert(), py::arg("scores").noconvert(), py::arg("classes").noconvert(),
        py::arg("iou_threshold"), py::arg("max_detections"), py::arg("max_candidates"), py::arg("max_class"),
        py::arg("out").noconvert());
}
