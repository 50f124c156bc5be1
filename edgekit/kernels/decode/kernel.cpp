// Decoding of detector heads. reference.py defines the arithmetic; this follows it operation by
// operation (the module is compiled with contraction off), so that both give the same bits anywhere.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace edgekit {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kLog2e = 1.4426950408889634, kSqrtHalf = 0.7071067811865476;
constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
constexpr double kInverseFactorials[14] = {1.0,           1.0,            1.0 / 2,         1.0 / 6,         1.0 / 24,
                                           1.0 / 120,     1.0 / 720,      1.0 / 5040,      1.0 / 40320,     1.0 / 362880,
                                           1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

inline double exp64(double x) {
    if (!(std::fabs(x) <= 708.0)) return x > 0 ? kInf : x < 0 ? 0.0 : kNan;
    const double n = std::nearbyint(x * kLog2e);
    const double r = (x - n * kLn2Hi) - n * kLn2Lo;
    double p = kInverseFactorials[13];
    for (int k = 12; k >= 0; k--) p = p * r + kInverseFactorials[k];
    const int e = int(n);
    if (e < -1021 || e > 1022) return std::ldexp(p, e);  // both are exact: a power of two
    const uint64_t bits = uint64_t(e + 1023) << 52;
    double scale;
    std::memcpy(&scale, &bits, 8);
    return p * scale;
}

inline double log64(double x) {
    if (!(x > 0)) return x == 0 ? -kInf : kNan;
    int e;
    double m = std::frexp(x, &e);
    if (m < kSqrtHalf) {
        m *= 2.0;
        e -= 1;
    }
    const double t = (m - 1.0) / (m + 1.0), u = t * t;
    double p = 1.0 / 21.0;
    for (int k = 19; k > 0; k -= 2) p = p * u + 1.0 / k;
    return (e * kLn2Hi + 2.0 * t * p) + e * kLn2Lo;
}

inline double sigmoid(double x) { return 1.0 / (1.0 + exp64(-x)); }

inline double tanh64(double x) {
    const double e = exp64(-2.0 * std::fabs(x));
    return std::copysign((1.0 - e) / (1.0 + e), x);
}

// One tensor [1, C, H, W] with any strides, in bytes.
struct View {
    const char* base;
    ptrdiff_t channel, row, column;
    int channels, height, width;

    const char* at(int c, int y, int x) const { return base + c * channel + y * row + x * column; }
    double value(int c, int y, int x) const { return *reinterpret_cast<const float*>(at(c, y, x)); }
};

enum class Family { yolox, yolov5, distribution, fastestdet, rows };

struct Grid {
    Family family;
    int height, width, bins, num_classes;
    double stride, offset, anchor[2], scale[2];
    int box_tensor, box[4], class_tensor, class_start, object_tensor, object_start, score, label;
    bool corners;
};

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

// Running maximum over channels; NaN never wins.
#define MAX_BODY                                                  \
    for (int i = 0; i < n; i++) best[i] = p[i] > best[i] ? p[i] : best[i]

void max_into(float* best, const float* p, int n) { MAX_BODY; }
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) void max_into_avx2(float* best, const float* p, int n) { MAX_BODY; }
#endif
#undef MAX_BODY

class Decoder {
public:
    explicit Decoder(const py::list& grids) {
        for (const py::handle& grid : grids) {
            grids_.push_back(read_grid(grid.cast<py::dict>()));
            columns_ = std::max(columns_, grids_.back().width);
        }
        cells_.resize(columns_);
        best_.resize(columns_);
#if defined(__x86_64__) && defined(__GNUC__)
        if (detect_isa() == Isa::avx2) max_ = max_into_avx2;
#endif
    }

    int run(const py::list& tensors, float threshold, float low_object, float low_class, bool all_classes,
            py::array_t<float> boxes, py::array_t<float> scores, py::array_t<int32_t> classes) {
        views_.clear();
        for (const py::handle& item : tensors) {
            const py::array a = py::reinterpret_borrow<py::array>(item);
            check(a.ndim() == 4 && a.itemsize() == 4, "decode tensor");
            views_.push_back({static_cast<const char*>(a.data()), a.strides(1), a.strides(2), a.strides(3),
                              int(a.shape(1)), int(a.shape(2)), int(a.shape(3))});
        }
        for (const Grid& g : grids_) check(fits(g), "decode grid");
        size_t capacity = 0;
        for (const Grid& g : grids_)
            capacity += size_t(g.height) * g.width * (all_classes && g.score < 0 ? g.num_classes : 1);
        check(size_t(scores.size()) >= capacity && size_t(boxes.size()) >= 4 * capacity &&
                  size_t(classes.size()) >= capacity, "decode capacity");
        all_classes_ = all_classes;
        threshold_ = threshold, low_object_ = low_object, low_class_ = low_class;
        boxes_ = boxes.mutable_data(), scores_ = scores.mutable_data(), classes_ = classes.mutable_data();
        py::gil_scoped_release release;
        found_ = 0;
        for (const Grid& g : grids_) run_grid(g);
        return found_;
    }

private:
    bool inside(int tensor, int channel, int count, const Grid& g) const {
        if (tensor < 0 || size_t(tensor) >= views_.size() || channel < 0) return false;
        const View& v = views_[tensor];
        return channel + count <= v.channels && g.height == v.height && g.width == v.width;
    }

    bool fits(const Grid& g) const {
        bool ok = g.object_tensor < 0 || inside(g.object_tensor, g.object_start, 1, g);
        for (int k = 0; k < 4; k++) ok = ok && inside(g.box_tensor, g.box[k], std::max(1, g.bins), g);
        if (g.score < 0) return ok && inside(g.class_tensor, g.class_start, g.num_classes, g);
        return ok && inside(g.box_tensor, g.score, 1, g) && (g.label < 0 || inside(g.box_tensor, g.label, 1, g));
    }

    void run_grid(const Grid& g) {
        const bool object = g.object_tensor >= 0;
        for (int y = 0; y < g.height; y++) {
            int n = 0;
            if (object) n = screen(views_[g.object_tensor], g.object_start, y, g.width, low_object_);
            else if (g.score >= 0) n = screen(views_[g.box_tensor], g.score, y, g.width, low_class_);
            else n = screen_classes(g, y);
            for (int k = 0; k < n; k++) cell(g, y, cells_[k]);
        }
    }

    // Columns of row y whose value is at least `low` (never NaN).
    int screen(const View& v, int channel, int y, int width, float low) {
        const char* p = v.at(channel, y, 0);
        int n = 0;
        for (int x = 0; x < width; x++, p += v.column) {
            cells_[n] = x;
            n += *reinterpret_cast<const float*>(p) >= low;
        }
        return n;
    }

    int screen_classes(const Grid& g, int y) {
        const View& v = views_[g.class_tensor];
        std::fill_n(best_.begin(), g.width, -std::numeric_limits<float>::infinity());
        if (v.column == 4) {
            // blocks that stay in the first cache while every class passes over them
            for (int x = 0; x < g.width; x += 1024)
                for (int c = 0; c < g.num_classes; c++)
                    max_(best_.data() + x, reinterpret_cast<const float*>(v.at(g.class_start + c, y, x)),
                         std::min(1024, g.width - x));
        } else {
            for (int x = 0; x < g.width; x++) {
                const char* p = v.at(g.class_start, y, x);
                float best = best_[x];
                for (int c = 0; c < g.num_classes; c++, p += v.channel) {
                    const float value = *reinterpret_cast<const float*>(p);
                    best = value > best ? value : best;
                }
                best_[x] = best;
            }
        }
        int n = 0;
        for (int x = 0; x < g.width; x++) {
            cells_[n] = x;
            n += best_[x] >= low_class_;
        }
        return n;
    }

    void cell(const Grid& g, int y, int x) {
        double best;
        int label = 0;
        if (g.score >= 0) {
            const View& v = views_[g.box_tensor];
            best = v.value(g.score, y, x);
            if (g.label >= 0) {
                const double named = std::nearbyint(v.value(g.label, y, x));
                if (!(named >= 0 && named < g.num_classes)) return;
                label = int(named);
            }
        } else {
            const View& v = views_[g.class_tensor];
            best = -kInf;
            const char* p = v.at(g.class_start, y, x);
            for (int c = 0; c < g.num_classes; c++, p += v.channel) {
                const double value = *reinterpret_cast<const float*>(p);
                if (value > best) best = value, label = c;
            }
        }
        if (!(best >= double(low_class_))) return;
        const bool object = g.object_tensor >= 0;
        const double raw = object ? views_[g.object_tensor].value(g.object_start, y, x) : 0.0;
        const double total = g.family == Family::fastestdet ? softmax_total(g, y, x, best) : 1.0;
        if (!all_classes_ || g.score >= 0) {
            emit(g, y, x, label, class_score(g, object, raw, best, best, total));
            return;
        }
        const View& v = views_[g.class_tensor];
        for (int c = 0; c < g.num_classes; c++) {
            const double value = v.value(g.class_start + c, y, x);
            if (value >= double(low_class_)) emit(g, y, x, c, class_score(g, object, raw, value, best, total));
        }
    }

    void emit(const Grid& g, int y, int x, int label, double exact) {
        const float score = float(exact);
        if (!(score >= threshold_ && score > 0 && std::isfinite(score))) return;
        float* box = boxes_ + size_t(4) * found_;
        cell_box(g, y, x, box);
        for (int k = 0; k < 4; k++)
            if (!std::isfinite(box[k])) return;
        scores_[found_] = score;
        classes_[found_++] = label;
    }

    double softmax_total(const Grid& g, int y, int x, double best) const {
        const View& v = views_[g.class_tensor];
        double total = 0.0;
        for (int c = 0; c < g.num_classes; c++) {
            const double value = v.value(g.class_start + c, y, x);
            total = total + exp64((value != value ? -kInf : value) - best);
        }
        return total;
    }

    static double class_score(const Grid& g, bool object, double raw, double value, double best, double total) {
        if (g.family == Family::rows) return object ? raw * value : value;
        if (g.family == Family::fastestdet)
            return exp64(0.6 * log64(sigmoid(raw)) + 0.4 * log64(exp64(value - best) / total));
        return object ? sigmoid(raw) * sigmoid(value) : sigmoid(value);
    }

    static double expected_bin(const View& v, int channel, int bins, int y, int x) {
        double top = v.value(channel, y, x);
        for (int k = 1; k < bins; k++) {
            const double value = v.value(channel + k, y, x);
            if (!(value <= top)) top = value != value ? top : value;
        }
        double total = 0.0, mean = 0.0;
        for (int k = 0; k < bins; k++) {
            const double e = exp64(v.value(channel + k, y, x) - top);
            total = total + e;
            mean = mean + e * k;
        }
        return mean / total;
    }

    void cell_box(const Grid& g, int y, int x, float* box) const {
        const View& v = views_[g.box_tensor];
        if (g.family == Family::distribution) {
            double side[4];
            for (int k = 0; k < 4; k++) side[k] = expected_bin(v, g.box[k], g.bins, y, x);
            const double cx = x + g.offset, cy = y + g.offset;
            box[0] = float((cx - side[0]) * g.stride);
            box[1] = float((cy - side[1]) * g.stride);
            box[2] = float((cx + side[2]) * g.stride);
            box[3] = float((cy + side[3]) * g.stride);
            return;
        }
        const double a = v.value(g.box[0], y, x), b = v.value(g.box[1], y, x);
        const double c = v.value(g.box[2], y, x), d = v.value(g.box[3], y, x);
        double cx, cy, w, h;
        if (g.family == Family::yolox) {
            cx = (a + x) * g.stride, cy = (b + y) * g.stride;
            w = exp64(c) * g.stride, h = exp64(d) * g.stride;
        } else if (g.family == Family::yolov5) {
            cx = (2.0 * sigmoid(a) - 0.5 + x) * g.stride;
            cy = (2.0 * sigmoid(b) - 0.5 + y) * g.stride;
            const double p = 2.0 * sigmoid(c), q = 2.0 * sigmoid(d);
            w = p * p * g.anchor[0], h = q * q * g.anchor[1];
        } else if (g.family == Family::fastestdet) {
            cx = (x + tanh64(a)) * g.stride, cy = (y + tanh64(b)) * g.stride;
            w = sigmoid(c) * g.scale[0], h = sigmoid(d) * g.scale[1];
        } else {
            cx = a * g.scale[0], cy = b * g.scale[1], w = c * g.scale[0], h = d * g.scale[1];
            if (g.corners) {
                box[0] = float(cx), box[1] = float(cy), box[2] = float(w), box[3] = float(h);
                return;
            }
        }
        box[0] = float(cx - 0.5 * w), box[1] = float(cy - 0.5 * h);
        box[2] = float(cx + 0.5 * w), box[3] = float(cy + 0.5 * h);
    }

    std::vector<Grid> grids_;
    std::vector<View> views_;
    std::vector<int> cells_;
    std::vector<float> best_;
    int columns_ = 1, found_ = 0;
    bool all_classes_ = false;
    void (*max_)(float*, const float*, int) = max_into;
    float threshold_ = 0, low_object_ = 0, low_class_ = 0;
    float *boxes_ = nullptr, *scores_ = nullptr;
    int32_t* classes_ = nullptr;
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(decode, m) {
    using edgekit::Decoder;
    py::class_<Decoder>(m, "Decoder")
        .def(py::init<const py::list&>())
        .def("run", &Decoder::run, py::arg("tensors"), py::arg("threshold"), py::arg("low_object"),
             py::arg("low_class"), py::arg("all_classes"), py::arg("boxes").noconvert(), py::arg("scores").noconvert(),
             py::arg("classes").noconvert());
}
