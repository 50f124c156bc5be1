// Voxelization: cells in parallel, then one pass over the points in their order through a hash table, so that
// voxels, slots and sums come out as reference.py defines them whatever the number of threads.
#include "common.h"
#include "threads.h"

#include <cmath>
#include <cstring>

namespace edgekit {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

constexpr uint32_t kOutside = UINT32_MAX;
constexpr int64_t kPiece = 8192;
constexpr int64_t kAhead = 12;  // points whose place in the table is fetched early

// Cell -> voxel by open addressing; grows as voxels come, so that a sparse sweep stays in the cache.
class Table {
public:
    Table() { resize(1 << 15); }

    void prefetch(uint32_t key) const { __builtin_prefetch(&entries_[place(key)], 1); }

    // Where the voxel of `key` stands or belongs: its value is -1 if it is new.
    int32_t& at(uint32_t key) {
        size_t i = place(key);
        while (entries_[i].value >= 0 && entries_[i].key != key) i = (i + 1) & mask_;
        entries_[i].key = key;
        return entries_[i].value;
    }

    // To be told of every voxel added.
    void added(size_t count) {
        if (2 * count <= mask_) return;
        std::vector<Entry> old;
        old.swap(entries_);
        resize(old.size() * 4);
        for (const Entry& e : old)
            if (e.value >= 0) at(e.key) = e.value;
    }

private:
    struct Entry {
        uint32_t key;
        int32_t value;
    };

    void resize(size_t n) {
        entries_.assign(n, Entry{0, -1});
        mask_ = n - 1;
        shift_ = 64 - __builtin_ctzll(n);
    }

    size_t place(uint32_t key) const { return (key * 0x9E3779B97F4A7C15ull) >> shift_; }

    std::vector<Entry> entries_;
    size_t mask_ = 0;
    int shift_ = 0;
};

struct Voxelizer {
    float low[3], size[3];
    int32_t grid[3];
    int channels;

    uint32_t cell(const float* p) const {
        int32_t at[3];
        for (int a = 0; a < 3; a++) {
            const float f = std::floor((p[a] - low[a]) / size[a]);
            if (!(f >= 0.0f && f < float(grid[a]))) return kOutside;
            at[a] = int32_t(f);
        }
        return uint32_t((at[2] * grid[1] + at[1]) * grid[0] + at[0]);
    }
};

template <class T>
py::array_t<T> array_of(const std::vector<T>& values, py::ssize_t rows, py::ssize_t columns) {
    py::array_t<T> out(columns ? std::vector<py::ssize_t>{rows, columns} : std::vector<py::ssize_t>{rows});
    if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
    return out;
}

py::tuple voxelize(const Floats& points, const Floats& low, const Floats& size, const Ints& grid, int max_points,
                   int max_voxels, int batch, int threads) {
    check(points.ndim() == 2 && points.shape(1) >= 3 && low.size() == 3 && size.size() == 3 && grid.size() == 3,
          "voxelize arrays");
    check(points.shape(0) <= INT32_MAX, "voxelize points");
    const int64_t n = points.shape(0);
    Voxelizer v;
    v.channels = int(points.shape(1));
    for (int a = 0; a < 3; a++) v.low[a] = low.data()[a], v.size[a] = size.data()[a], v.grid[a] = grid.data()[a];
    Ints voxel(n), slot(n);
    const float* p = points.data();
    int32_t *voxel_of = voxel.mutable_data(), *slot_of = slot.mutable_data();
    std::vector<uint32_t> keys;
    std::vector<int32_t> counts, coordinates;
    std::vector<float> sums;
    {
        py::gil_scoped_release release;
        const int c = v.channels;
        std::vector<uint32_t> cells(n);
        parallel_for(n, kPiece, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) cells[i] = v.cell(p + i * c);
        });
        Table table;
        for (int64_t i = 0; i < n; i++) {
            if (i + kAhead < n) table.prefetch(cells[i + kAhead]);
            voxel_of[i] = slot_of[i] = -1;
            if (cells[i] == kOutside) continue;
            int32_t& found = table.at(cells[i]);
            int32_t id = found;
            if (id < 0) {
                if (max_voxels && int64_t(keys.size()) >= max_voxels) continue;
                id = found = int32_t(keys.size());
                keys.push_back(cells[i]);
                counts.push_back(0);
                sums.resize(sums.size() + c, 0.0f);
                table.added(keys.size());
            }
            if (max_points && counts[id] >= max_points) continue;
            voxel_of[i] = id;
            slot_of[i] = counts[id]++;
            float* sum = sums.data() + int64_t(id) * c;
            for (int k = 0; k < c; k++) sum[k] += p[i * c + k];
        }
        const int64_t m = int64_t(keys.size());
        coordinates.resize(4 * m);
        parallel_for(m, kPiece, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const uint32_t key = keys[i], row = key / uint32_t(v.grid[0]);
                int32_t* at = &coordinates[4 * i];
                at[0] = batch;
                at[1] = int32_t(row / uint32_t(v.grid[1]));
                at[2] = int32_t(row % uint32_t(v.grid[1]));
                at[3] = int32_t(key % uint32_t(v.grid[0]));
                for (int k = 0; k < c; k++) sums[i * c + k] /= float(counts[i]);
            }
        });
    }
    const py::ssize_t m = py::ssize_t(keys.size());
    return py::make_tuple(array_of(coordinates, m, 4), array_of(sums, m, v.channels), array_of(counts, m, 0), voxel,
                          slot);
}

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(voxelize, m) {
    m.def("voxelize", &edgekit::voxelize, py::arg("points").noconvert(), py::arg("low").noconvert(),
          py::arg("size").noconvert(), py::arg("grid").noconvert(), py::arg("max_points"), py::arg("max_voxels"),
          py::arg("batch"), py::arg("threads"));
}
