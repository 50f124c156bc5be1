// BEV pooling: the association table from geometry, and the sums of depth x feature over it.
#include "bev_pool/blocks.h"
#include "bev_pool/pool.h"
#include "threads.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>

namespace edgekit {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

struct Axis {
    double low, step, count;
};

// Cells of the depth bins of one ray: -1 outside. `work`: [bins].
struct Cells {
    Axis axes[3];
    bool trunc, yx;

    int32_t at(const double* ray, const double* origin, double z) const {
        double cell[3];
        for (int k = 0; k < 3; k++) {
            const double point = ray[k] * z + origin[k], q = (point - axes[k].low) / axes[k].step;
            cell[k] = trunc ? std::trunc(q) : std::floor(q);
            if (!(cell[k] >= 0 && cell[k] < axes[k].count)) return -1;
        }
        const int32_t x = int32_t(cell[0]), y = int32_t(cell[1]);
        return yx ? y * int32_t(axes[0].count) + x : x * int32_t(axes[1].count) + y;
    }
};

py::tuple build(const Array<double>& rays, const Array<double>& origins, const Array<double>& depths,
                const std::array<std::array<double, 3>, 3>& axes, bool trunc, bool yx, int threads) {
    check(rays.ndim() == 4 && rays.shape(3) == 3 && origins.size() == 3 * rays.shape(0), "bev_pool geometry");
    const int cameras = int(rays.shape(0)), height = int(rays.shape(1)), width = int(rays.shape(2));
    const int bins = int(depths.size());
    Cells cells{{}, trunc, yx};
    for (int k = 0; k < 3; k++) cells.axes[k] = {axes[k][0], axes[k][1], axes[k][2]};
    const int64_t count = int64_t(axes[0][2]) * int64_t(axes[1][2]);
    const double *r = rays.data(), *o = origins.data(), *z = depths.data();
    struct Found {
        int32_t cell;
        Run run;
    };
    const int64_t columns = int64_t(cameras) * width, grain = 8;
    std::vector<std::vector<Found>> found;
    Array<int32_t> starts(count + 1);
    int32_t* start = starts.mutable_data();
    int64_t total = 0;
    {
        py::gil_scoped_release release;
        found.resize((columns + grain - 1) / grain);
        parallel_for(columns, grain, threads, [&](int64_t begin, int64_t end) {
            std::vector<Found>& list = found[begin / grain];
            for (int64_t at = begin; at < end; at++) {
                const int camera = int(at / width), column = int(at % width);
                for (int d = 0; d < bins; d++) {
                    int32_t open = -1;  // the cell of the run that may go on
                    for (int row = 0; row < height; row++) {
                        const int64_t pixel = (int64_t(camera) * height + row) * width + column;
                        const int32_t cell = cells.at(r + 3 * pixel, o + 3 * camera, z[d]);
                        if (cell >= 0 && cell == open) list.back().run.rows++;
                        else if (cell >= 0) {
                            const int64_t depth = ((int64_t(camera) * bins + d) * height + row) * width + column;
                            list.push_back({cell, {uint32_t(depth), uint32_t(pixel), uint32_t(camera) << kCountBits | 1u}});
                        }
                        open = cell;
                    }
                }
            }
        });
        std::fill(start, start + count + 1, 0);
        for (const auto& list : found) {
            total += int64_t(list.size());
            for (const Found& f : list) start[f.cell + 1]++;
        }
        for (int64_t i = 0; i < count; i++) start[i + 1] += start[i];
    }
    Array<uint32_t> runs({py::ssize_t(total), py::ssize_t(3)});
    Run* sorted = reinterpret_cast<Run*>(runs.mutable_data());
    {
        py::gil_scoped_release release;
        std::vector<int32_t> next(start, start + count);
        for (const auto& list : found)
            for (const Found& f : list) sorted[next[f.cell]++] = f.run;
    }
    return py::make_tuple(starts, runs);
}

class BevPool {
public:
    // starts [cells + 1], runs [n, 3]: kept, not copied; they may be a file that is mapped.  shape: cam, D, h, w.
    // columns: of the grid.
    BevPool(Array<int32_t> starts, Array<uint32_t> runs, std::array<int, 4> shape, int columns, int channels, bool last,
            const std::string& isa)
        : starts_(std::move(starts)), runs_(std::move(runs)), shape_(shape), cells_(starts_.size() - 1),
          columns_(columns), channels_(channels), last_(last) {
        check(cells_ > 0 && runs_.ndim() == 2 && runs_.shape(1) == 3 && cells_ % columns == 0, "bev_pool table");
        check(consistent(starts_.data(), this->runs(), runs_.shape(0)), "bev_pool table");
        block_ = pick(isa);
    }

    void run(const Array<float>& depth, const Array<float>& features, Array<float> out, const Array<uint8_t>& used,
             bool stream, int threads) const {
        const int64_t pixels = int64_t(shape_[0]) * shape_[2] * shape_[3];
        check(depth.size() == pixels * shape_[1] && features.size() == pixels * channels_ &&
                  out.size() == cells_ * channels_ && used.size() == shape_[0],
              "bev_pool tensors");
        float* to = out.mutable_data();
        const bool lined = !last_ && cells_ % kLine == 0;  // else planes lie on lines each in its own way
        const int into = lined ? int(reinterpret_cast<uintptr_t>(to) / sizeof(float) % kLine) : 0;
        PoolJob j{};
        j.depth = depth.data(), j.features = features.data(), j.used = used.data(), j.out = to;
        j.cells = cells_, j.width = shape_[3], j.channels = channels_, j.into = into;
        j.last = last_, j.stream = stream && lined;
        py::gil_scoped_release release;
        j.features = aligned(j.features, pixels, threads);
        const Blocks& plan = blocks(into);
        j.runs = plan.runs.data(), j.segments = plan.segments.data();
        parallel_for(int64_t(plan.blocks.size()), 1, threads, [&](int64_t begin, int64_t end) {
            static thread_local std::vector<float> work;
            for (int64_t i = begin; i < end; i++) {
                const size_t size = size_t(plan.blocks[i].cells) * channels_ + kLine;
                if (work.size() < size) work.resize(size);
                const uintptr_t at = (reinterpret_cast<uintptr_t>(work.data()) + 63) / 64 * 64;
                block_(j, plan.blocks[i], reinterpret_cast<float*>(at));
            }
        });
    }

    const char* isa() const { return isa_; }

private:
    const Run* runs() const { return reinterpret_cast<const Run*>(runs_.data()); }

    // Features on cache lines, copied there if they are not: vectors that cross lines would cost more than the copy.
    const float* aligned(const float* features, int64_t pixels, int threads) const {
        if (reinterpret_cast<uintptr_t>(features) % 64 == 0 || channels_ % kLine != 0) return features;
        static thread_local std::vector<float> memory;
        const int64_t count = pixels * channels_;
        if (int64_t(memory.size()) < count + kLine) memory.resize(size_t(count + kLine));
        float* to = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        parallel_for(count, 1 << 16, threads, [&](int64_t begin, int64_t end) {
            std::memcpy(to + begin, features + begin, sizeof(float) * size_t(end - begin));
        });
        return to;
    }

    // Made once for each way that results lie on cache lines, which is mostly one.
    const Blocks& blocks(int into) const {
        std::lock_guard<std::mutex> lock(making_);
        if (!blocks_[into])
            blocks_[into] = std::make_unique<Blocks>(
                cut(starts_.data(), runs(), cells_, columns_, shape_[2], shape_[3], into, block_rows(channels_)));
        return *blocks_[into];
    }

    using PoolBlock = void (*)(const PoolJob&, const Block&, float*);

    PoolBlock pick(const std::string& isa) {
        check(isa == "auto" || isa == "avx2" || isa == "portable", "bev_pool isa");
        const Isa best = isa == "portable" ? Isa::portable : detect_isa();
        isa_ = isa_name(best);
#if defined(__x86_64__) && defined(__GNUC__)
        if (isa == "auto" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            isa_ = "avx512";
            return pool_block_widest;
        }
#endif
        return EDGEKIT_PICK(pool_block, best);
    }

    // Whether no run leaves the tensors: a table may come from a file.
    bool consistent(const int32_t* start, const Run* run, int64_t n) const {
        const int64_t bins = shape_[1], h = shape_[2], w = shape_[3];
        bool good = start[0] == 0 && start[cells_] == n;
        for (int64_t i = 0; i < cells_; i++) good &= start[i] <= start[i + 1];
        for (int64_t i = 0; i < n; i++) {
            const int64_t camera = run[i].rows >> kCountBits, reach = int64_t(run[i].rows & ((1u << kCountBits) - 1)) - 1;
            const int64_t pixel = run[i].pixel, depth = run[i].depth;
            good &= camera < shape_[0] && reach >= 0 && pixel >= camera * h * w && pixel + reach * w < (camera + 1) * h * w;
            good &= depth >= camera * bins * h * w && depth + reach * w < (camera + 1) * bins * h * w;
        }
        return good;
    }

    Array<int32_t> starts_;
    Array<uint32_t> runs_;
    std::array<int, 4> shape_;
    int64_t cells_;
    int columns_, channels_;
    bool last_;
    PoolBlock block_ = nullptr;
    const char* isa_ = nullptr;
    mutable std::mutex making_;
    mutable std::unique_ptr<Blocks> blocks_[kLine];
};

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(bev_pool, m) {
    using edgekit::BevPool;
    m.def("bev_table", &edgekit::build, py::arg("rays").noconvert(), py::arg("origins").noconvert(),
          py::arg("depths").noconvert(), py::arg("axes"), py::arg("trunc"), py::arg("yx"), py::arg("threads"));
    py::class_<BevPool>(m, "BevPool")
        .def(py::init<edgekit::Array<int32_t>, edgekit::Array<uint32_t>, std::array<int, 4>, int,
                      int, bool, const std::string&>(),
             py::arg("starts").noconvert(), py::arg("runs").noconvert(), py::arg("shape"), py::arg("columns"), py::arg("channels"),
             py::arg("last"), py::arg("isa"))
        .def("run", &BevPool::run, py::arg("depth").noconvert(), py::arg("features").noconvert(),
             py::arg("out").noconvert(), py::arg("used").noconvert(), py::arg("stream"), py::arg("threads"))
        .def_property_readonly("isa", &BevPool::isa);
}
