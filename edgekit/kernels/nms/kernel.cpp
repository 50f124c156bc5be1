// Greedy class-aware NMS; reference.py states the rule. Kept boxes are chained by class, so a box is
// compared with those of its own class only and no class offsets distort the coordinates.
#include "common.h"

#include <algorithm>
#include <cmath>

namespace edgekit {
namespace {

struct Kept {
    float x1, y1, x2, y2, area;
    int next;  // the one kept before it in the same class, or -1
};

// Number of boxes kept, their indices in `out`; -1 for a class outside 0..max_class.
int nms(const float* boxes, const float* scores, const int32_t* classes, int n, float threshold, int max_detections,
        int max_candidates, int max_class, int32_t* out) {
    // one set per thread, grown once: nothing is allocated per call
    static thread_local std::vector<int32_t> order;
    static thread_local std::vector<Kept> kept;
    static thread_local std::vector<int> last;

    order.clear();
    int32_t top_class = -1;
    for (int i = 0; i < n; i++) {
        const float* b = boxes + size_t(4) * i;
        if (classes[i] < 0 || classes[i] > max_class) return -1;
        if (scores[i] != scores[i]) continue;
        if (!(std::isfinite(b[0]) && std::isfinite(b[1]) && std::isfinite(b[2]) && std::isfinite(b[3]))) continue;
        order.push_back(i);
        top_class = std::max(top_class, classes[i]);
    }
    const auto better = [scores](int32_t a, int32_t b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    };
    if (order.size() > size_t(max_candidates)) {
        std::nth_element(order.begin(), order.begin() + max_candidates, order.end(), better);
        order.resize(max_candidates);
    }
    std::sort(order.begin(), order.end(), better);

    kept.clear();
    last.assign(size_t(top_class) + 1, -1);
    for (const int32_t i : order) {
        if (int(kept.size()) >= max_detections) break;
        const float* b = boxes + size_t(4) * i;
        const float area = std::max(b[2] - b[0], 0.0f) * std::max(b[3] - b[1], 0.0f);
        bool drop = false;
        for (int k = last[classes[i]]; k >= 0 && !drop; k = kept[k].next) {
            const Kept& a = kept[k];
            const float w = std::max(std::min(a.x2, b[2]) - std::max(a.x1, b[0]), 0.0f);
            const float h = std::max(std::min(a.y2, b[3]) - std::max(a.y1, b[1]), 0.0f);
            const float inter = w * h;
            drop = inter > threshold * (a.area + area - inter);
        }
        if (drop) continue;
        out[kept.size()] = i;
        kept.push_back({b[0], b[1], b[2], b[3], area, last[classes[i]]});
        last[classes[i]] = int(kept.size()) - 1;
    }
    return int(kept.size());
}

}  // namespace
}  // namespace edgekit

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
            return edgekit::nms(b, s, c, n, threshold, max_detections, max_candidates, max_class, o);
        },
        py::arg("boxes").noconvert(), py::arg("scores").noconvert(), py::arg("classes").noconvert(),
        py::arg("iou_threshold"), py::arg("max_detections"), py::arg("max_candidates"), py::arg("max_class"),
        py::arg("out").noconvert());
}
