// IoU matrices and greedy NMS of rotated boxes; boxes.h has the arithmetic, reference.py the rule.
#include "boxes3d/boxes.h"
#include "common.h"
#include "threads.h"

#include <vector>

namespace edgekit::boxes3d {

std::vector<Block> blocks_of(const float* boxes, int64_t n) {
    std::vector<Block> blocks(size_t((n + Block::kLanes - 1) / Block::kLanes));
    for (int64_t i = 0; i < n; i++) blocks[size_t(i / Block::kLanes)].set(int(i % Block::kLanes), prepare(boxes + 7 * i));
    return blocks;
}

void matrix(const float* a, int64_t n, const float* b, int m, bool three_d, int threads, float* out) {
    const auto one_row = EDGEKIT_PICK(row, detect_isa());
    const std::vector<Block> blocks = blocks_of(b, m);
    // about 4096 pairs a piece, some 50 us
    const int64_t grain = 1 + 4096 / (m + 1);
    parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) one_row(prepare(a + 7 * i), blocks.data(), m, three_d, out + i * m);
    });
}

// The kept boxes of a class lie in blocks chained from the newest: a box meets those of its own class only.
struct Kept {
    Block block;
    int used = 0, next = -1;
};

int nms(const float* boxes, const float* scores, const int32_t* classes, int n, const float* limits, int num_classes,
        bool circle, int max_detections, int max_candidates, int32_t* out) {
    const auto hit = circle ? EDGEKIT_PICK(within, detect_isa()) : EDGEKIT_PICK(suppressed, detect_isa());
    std::vector<int32_t> order;
    order.reserve(size_t(n));
    std::vector<Box> prepared(static_cast<size_t>(n));
    for (int32_t i = 0; i < n; i++) {
        if (scores[i] != scores[i]) continue;
        prepared[size_t(i)] = prepare(boxes + 7 * int64_t(i));
        if (prepared[size_t(i)].usable()) order.push_back(i);
    }
    const auto better = [&](int32_t i, int32_t j) {
        return scores[i] > scores[j] || (scores[i] == scores[j] && i < j);
    };
    const size_t count = std::min(order.size(), size_t(max_candidates));
    std::partial_sort(order.begin(), order.begin() + ptrdiff_t(count), order.end(), better);
    std::vector<Kept> kept;
    std::vector<int> last(size_t(num_classes), -1);
    int found = 0;
    for (size_t at = 0; at < count && found < max_detections; at++) {
        const int32_t i = order[at];
        const Box& box = prepared[size_t(i)];
        int& newest = last[size_t(classes[i])];
        const double limit = limits[classes[i]];
        int k = newest;
        while (k >= 0 && !hit(kept[size_t(k)].block, box, limit)) k = kept[size_t(k)].next;
        if (k >= 0) continue;
        out[found++] = i;
        if (newest < 0 || kept[size_t(newest)].used == Block::kLanes) {
            kept.emplace_back();
            kept.back().next = newest;
            newest = int(kept.size()) - 1;
        }
        Kept& into = kept[size_t(newest)];
        into.block.set(into.used++, box);
    }
    return found;
}

}  // namespace edgekit::boxes3d

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

EDGEKIT_KERNEL(boxes3d, m) {
    m.def(
        "boxes3d_iou",
        [](const Floats& a, const Floats& b, bool three_d, int threads, Floats out) {
            const py::ssize_t n = a.size() / 7, k = b.size() / 7;
            edgekit::check(a.size() == 7 * n && b.size() == 7 * k && out.size() == n * k && k < (1 << 30), "boxes3d_iou arrays");
            const float *p = a.data(), *q = b.data();
            float* o = out.mutable_data();
            py::gil_scoped_release release;
            edgekit::boxes3d::matrix(p, n, q, int(k), three_d, threads, o);
        },
        py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("three_d"), py::arg("threads"),
        py::arg("out").noconvert());
    m.def(
        "boxes3d_nms",
        [](const Floats& boxes, const Floats& scores, const Ints& classes, const Floats& limits, bool circle,
           int max_detections, int max_candidates, Ints out) {
            const int n = int(scores.size());
            edgekit::check(boxes.size() == 7 * py::ssize_t(n) && classes.size() == n, "boxes3d_nms arrays");
            edgekit::check(out.size() >= std::min(n, max_detections), "boxes3d_nms out");
            const float *b = boxes.data(), *s = scores.data(), *l = limits.data();
            const int32_t* c = classes.data();
            const int num_classes = int(limits.size());
            for (int i = 0; i < n; i++) edgekit::check(c[i] >= 0 && c[i] < num_classes, "boxes3d_nms classes");
            int32_t* o = out.mutable_data();
            py::gil_scoped_release release;
            return edgekit::boxes3d::nms(b, s, c, n, l, num_classes, circle, max_detections, max_candidates, o);
        },
        py::arg("boxes").noconvert(), py::arg("scores").noconvert(), py::arg("classes").noconvert(),
        py::arg("limits").noconvert(), py::arg("circle"), py::arg("max_detections"), py::arg("max_candidates"),
        py::arg("out").noconvert());
}
