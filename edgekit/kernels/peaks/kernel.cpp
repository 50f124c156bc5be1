// Peaks of heat maps; reference.py states the rule. One pass over the logits, 16 at a time, in which only those that
// reach the threshold are looked at.
#include "common.h"
#include "decode/lanes.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

namespace edgekit::peaks {

struct Map {
    const float* data;
    int channels;
};

// Falls as the value rises, equal for both zeros.
inline uint32_t rank(float value) {
    uint32_t bits;
    value += 0.0f;
    std::memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

inline float score_of(float logit) {
    using D = V<16>::D;
    const D e = exp_of<16>(D{} - double(logit));
    return float(1.0 / (1.0 + e[0]));
}

// Whether `p`, at (x, y) of a plane, is greater than its neighbours before it and not less than those after it.
inline bool greatest(const float* p, int x, int y, int width, int height) {
    const float v = *p;
    const bool left = x > 0, right = x + 1 < width;
    if (left && p[-1] >= v) return false;
    if (right && p[1] > v) return false;
    if (y > 0) {
        const float* q = p - width;
        if (q[0] >= v || (left && q[-1] >= v) || (right && q[1] >= v)) return false;
    }
    if (y + 1 < height) {
        const float* q = p + width;
        if (q[0] > v || (left && q[-1] > v) || (right && q[1] > v)) return false;
    }
    return true;
}

// Which of 16 cells are peaks, as bits; `width` floats before and behind them, and one more, must be there to read.
template <int B>
EDGEKIT_INLINE uint32_t peaks_of_16(const float* p, ptrdiff_t width, float low) {
    using F = typename V<B>::F;
    uint32_t bits = 0;
    for (int i = 0; i < 16; i += V<B>::kFloats) {
        const F zero{}, v = load<F>(p + i);
        typename V<B>::I peak = (v >= zero + low) & (v <= zero + std::numeric_limits<float>::max());
        for (const ptrdiff_t k : {-width - 1, -width, -width + 1, ptrdiff_t(-1)}) peak &= ~(load<F>(p + i + k) >= v);
        for (const ptrdiff_t k : {ptrdiff_t(1), width - 1, width, width + 1}) peak &= ~(load<F>(p + i + k) > v);
        if (!any<B>(peak)) continue;
        for (int k = 0; k < V<B>::kFloats; k++) bits |= uint32_t(peak[k] & 1) << (i + k);
    }
    return bits;
}

EDGEKIT_LANES(uint32_t, peaks_of_16, (const float* p, ptrdiff_t width, float low), (p, width, low))

// (rank, flat index) of every peak.
void scan(const float* heat, int classes, int height, int width, const int32_t* windows, float low,
          std::vector<uint64_t>& found) {
    const Isa isa = detect_isa();
    const auto above = EDGEKIT_PICK(any_above, isa);
    const auto peaks_of = EDGEKIT_PICK(peaks_of_16, isa);
    const int64_t plane = int64_t(height) * width;
    const float most = std::numeric_limits<float>::max();
    for (int c = 0; c < classes; c++) {
        const float* p = heat + c * plane;
        const bool wide = windows[c] == 3;
        const auto is_peak = [&](int64_t i) {
            return p[i] >= low && p[i] <= most &&
                   (!wide || greatest(p + i, int(i % width), int(i / width), width, height));
        };
        const auto keep = [&](int64_t i) { found.push_back(uint64_t(rank(p[i])) << 32 | uint64_t(c * plane + i)); };
        for (int64_t begin = 0; begin < plane; begin += 16) {
            const int64_t end = std::min(plane, begin + 16);
            if (end - begin == 16 && !above(p + begin, low)) continue;
            if (!wide || begin <= width || end + width >= plane) {
                for (int64_t i = begin; i < end; i++)
                    if (is_peak(i)) keep(i);
                continue;
            }
            uint32_t bits = peaks_of(p + begin, width, low);
            // where a row ends within the 16, neighbours were taken from the other end of it
            for (int64_t edge = (begin + width - 1) / width * width; edge <= end; edge += width)
                for (int64_t i = std::max(begin, edge - 1); i <= std::min(end - 1, edge); i++)
                    bits = (bits & ~(1u << (i - begin))) | uint32_t(is_peak(i)) << (i - begin);
            for (; bits != 0; bits &= bits - 1) keep(begin + __builtin_ctz(bits));
        }
    }
}

int peaks(const float* heat, int classes, int height, int width, const std::vector<Map>& maps, const int32_t* windows,
          float low, int limit, float* scores, int32_t* cells, float* values) {
    std::vector<uint64_t> found;
    scan(heat, classes, height, width, windows, low, found);
    const size_t count = std::min(found.size(), size_t(limit));
    // by value of the index too: no two are equal, so the order is one
    if (count < found.size()) std::nth_element(found.begin(), found.begin() + ptrdiff_t(count), found.end());
    std::sort(found.begin(), found.begin() + ptrdiff_t(count));
    const int64_t plane = int64_t(height) * width;
    for (size_t k = 0; k < count; k++) {
        const int64_t at = int64_t(uint32_t(found[k])), cell = at % plane;
        scores[k] = score_of(heat[at]);
        cells[3 * k] = int32_t(at / plane);
        cells[3 * k + 1] = int32_t(cell / width);
        cells[3 * k + 2] = int32_t(cell % width);
        for (const Map& map : maps)
            for (int c = 0; c < map.channels; c++) *values++ = map.data[c * plane + cell];
    }
    return int(count);
}

}  // namespace edgekit::peaks

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

EDGEKIT_KERNEL(peaks, m) {
    m.def(
        "peaks",
        [](const Floats& heat, const std::vector<Floats>& maps, const Ints& windows, double low, int limit,
           Floats scores, Ints cells, Floats values) {
            edgekit::check(heat.ndim() == 3 && windows.size() == heat.shape(0), "peaks heat");
            const int classes = int(heat.shape(0)), height = int(heat.shape(1)), width = int(heat.shape(2));
            const py::ssize_t most = std::min<py::ssize_t>(limit, heat.size());
            py::ssize_t channels = 0;
            std::vector<edgekit::peaks::Map> planes;
            for (const Floats& map : maps) {
                edgekit::check(map.ndim() == 3 && map.shape(1) == height && map.shape(2) == width, "peaks map");
                planes.push_back({map.data(), int(map.shape(0))});
                channels += map.shape(0);
            }
            edgekit::check(scores.size() >= most && cells.size() >= 3 * most && values.size() >= most * channels,
                           "peaks out");
            const float* h = heat.data();
            const int32_t* w = windows.data();
            float *s = scores.mutable_data(), *v = values.mutable_data();
            int32_t* c = cells.mutable_data();
            py::gil_scoped_release release;
            return edgekit::peaks::peaks(h, classes, height, width, planes, w, float(low), limit, s, c, v);
        },
        py::arg("heat").noconvert(), py::arg("maps"), py::arg("windows").noconvert(), py::arg("low"),
        py::arg("limit"), py::arg("scores").noconvert(), py::arg("cells").noconvert(),
        py::arg("values").noconvert());
}
