// Depth images of a point cloud: reference.py defines what this gives.
#include "common.h"
#include "threads.h"
#include "vectors.h"

#include <algorithm>

namespace edgekit {
namespace {

constexpr int kPoints = 512;  // that are projected before they are drawn

struct View {
    const float* matrix;  // [3, 4]
    float near, far;
    int height, width;
};

// Pixel of each point, -1 for those that do not count, and its depth. x, y, z: [kPoints].
template <int B>
EDGEKIT_INLINE void project(const View& view, const float* x, const float* y, const float* z, int32_t* pixel, float* depth) {
    using F = typename V<B>::F;
    using I = typename V<B>::I;
    const float *m = view.matrix, *n = m + 4, *o = m + 8;
    const F zero{};
    for (int i = 0; i < kPoints; i += V<B>::kFloats) {
        const F a = load<F>(x + i), b = load<F>(y + i), c = load<F>(z + i);
        const F d = ((o[0] * a + o[1] * b) + o[2] * c) + o[3];
        const F u = (((m[0] * a + m[1] * b) + m[2] * c) + m[3]) / d, v = (((n[0] * a + n[1] * b) + n[2] * c) + n[3]) / d;
        const I inside = (d > zero + view.near) & (d <= zero + view.far) & (u >= zero) & (u < zero + float(view.width)) &
                         (v >= zero) & (v < zero + float(view.height));
        const F column = inside ? u : zero, row = inside ? v : zero;
        const I at = __builtin_convertvector(row, I) * view.width + __builtin_convertvector(column, I);
        store(pixel + i, inside ? at : I{} - 1);
        store(depth + i, d);
    }
}

EDGEKIT_LANES(void, project,
              (const View& view, const float* x, const float* y, const float* z, int32_t* pixel, float* depth),
              (view, x, y, z, pixel, depth))

void draw(const View& view, const float* points, int64_t n, int64_t step, float* image, Isa isa) {
    alignas(64) float x[kPoints], y[kPoints], z[kPoints], depth[kPoints];
    alignas(64) int32_t pixel[kPoints];
    const auto projected = EDGEKIT_PICK(project, isa);
    std::fill(image, image + int64_t(view.height) * view.width, 0.0f);
    for (int64_t first = 0; first < n; first += kPoints) {
        const int count = int(std::min<int64_t>(kPoints, n - first));
        for (int i = 0; i < count; i++) {
            const float* p = points + (first + i) * step;
            x[i] = p[0], y[i] = p[1], z[i] = p[2];
        }
        for (int i = count; i < kPoints; i++) x[i] = y[i] = z[i] = 0;
        projected(view, x, y, z, pixel, depth);
        for (int i = 0; i < count; i++) {
            if (pixel[i] < 0) continue;
            float& here = image[pixel[i]];
            if (here == 0 || depth[i] < here) here = depth[i];  // depths are above 0
        }
    }
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void depth_raster(const Array<float>& points, const Array<float>& matrices, Array<float> out, float near, float far,
                  int threads, const std::string& isa) {
    check(points.ndim() == 2 && points.shape(1) >= 3 && matrices.ndim() == 3 && matrices.shape(1) == 3 &&
              matrices.shape(2) == 4 && out.ndim() == 3 && out.shape(0) == matrices.shape(0) &&
              (isa == "auto" || isa == "portable"),
          "depth_raster arrays");
    const float *p = points.data(), *m = matrices.data();
    const int64_t n = points.shape(0), step = points.shape(1), cameras = out.shape(0);
    const int height = int(out.shape(1)), width = int(out.shape(2));
    float* o = out.mutable_data();
    const Isa best = isa == "portable" ? Isa::portable : detect_isa();
    py::gil_scoped_release release;
    parallel_for(cameras, 1, threads, [&](int64_t begin, int64_t end) {  // an image has one writer
        for (int64_t k = begin; k < end; k++)
            draw({m + 12 * k, near, far, height, width}, p, n, step, o + k * height * width, best);
    });
}

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(depth_raster, m) {
    m.def("depth_raster", &edgekit::depth_raster, py::arg("points").noconvert(), py::arg("matrices").noconvert(),
          py::arg("out").noconvert(), py::arg("near"), py::arg("far"), py::arg("threads"), py::arg("isa") = "auto");
}
