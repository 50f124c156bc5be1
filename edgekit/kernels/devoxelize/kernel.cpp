// Trilinear interpolation from sparse voxels, in the order of reference.py. A pair of neighbours in x shares a block
// of bits (sparse_conv/sites.h), so a point costs four or, at a block's end, eight look-ups by hash.
#include "sparse_conv/sites.h"

#include <cmath>

namespace edgekit {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;

constexpr int64_t kPiece = 1024;
constexpr float kFar = 16777216.0f;

// Block of a key, by open addressing.
class BlockTable {
public:
    explicit BlockTable(const std::vector<Block>& blocks) : blocks_(blocks) {
        size_t n = 64;
        while (n < 2 * blocks.size()) n *= 2;
        table_.assign(n, -1);
        for (size_t b = 0; b < blocks.size(); b++) {
            size_t i = place(blocks[b].key);
            while (table_[i] >= 0) i = (i + 1) & (n - 1);
            table_[i] = int32_t(b);
        }
    }

    const Block* find(uint64_t key) const {
        for (size_t i = place(key);; i = (i + 1) & (table_.size() - 1)) {
            if (table_[i] < 0) return nullptr;
            const Block& b = blocks_[size_t(table_[i])];
            if (b.key == key) return &b;
        }
    }

private:
    size_t place(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ull) >> (64 - __builtin_ctzll(table_.size())); }

    const std::vector<Block>& blocks_;
    std::vector<int32_t> table_;
};

py::tuple neighbours(const Floats& points, const Sites& sites, const Floats& low, const Floats& size, float center,
                     int batch, int threads) {
    check(points.ndim() == 2 && points.shape(1) >= 3 && low.size() == 3 && size.size() == 3, "devoxelize arrays");
    const int64_t n = points.shape(0), step = points.shape(1);
    Ints index({py::ssize_t(n), py::ssize_t(8)});
    Floats weight({py::ssize_t(n), py::ssize_t(8)});
    const float *p = points.data(), *lo = low.data(), *side = size.data();
    int32_t* index_of = index.mutable_data();
    float* weight_of = weight.mutable_data();
    {
        py::gil_scoped_release release;
        const BlockTable table(sites.blocks);
        parallel_for(n, kPiece, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                int32_t* to = index_of + 8 * i;
                float* w = weight_of + 8 * i;
                std::fill_n(to, 8, -1);
                std::fill_n(w, 8, 0.0f);
                float part[3][2];
                int64_t base[3];
                bool usable = true;
                for (int a = 0; a < 3; a++) {
                    const float q = (p[i * step + a] - lo[a]) / side[a] - center;
                    usable = usable && std::fabs(q) < kFar;
                    if (!usable) break;
                    const float f = std::floor(q);
                    base[a] = int64_t(f);
                    part[a][1] = q - f;
                    part[a][0] = 1.0f - part[a][1];
                }
                if (!usable) continue;
                for (int k = 0; k < 8; k++) {
                    const int dz = k >> 2, dy = k >> 1 & 1, dx = k & 1;
                    const int64_t z = base[2] + dz, y = base[1] + dy, x = base[0] + dx;
                    if (z < 0 || z >= sites.shape.z || y < 0 || y >= sites.shape.y || x < 0 || x >= sites.shape.x) continue;
                    const Block* b = table.find(sites.row(batch, z, y) * uint64_t(sites.row_blocks) + uint64_t(x / 64));
                    const uint64_t bit = uint64_t(1) << (x % 64);
                    if (b == nullptr || !(b->bits & bit)) continue;
                    to[k] = b->before + __builtin_popcountll(b->bits & (bit - 1));
                    w[k] = (part[2][dz] * part[1][dy]) * part[0][dx];
                }
                float total = w[0];
                for (int k = 1; k < 8; k++) total += w[k];
                if (total > 0.0f)
                    for (int k = 0; k < 8; k++) w[k] /= total;
            }
        });
    }
    return py::make_tuple(index, weight);
}

Floats devoxelize(const Floats& features, const Ints& index, const Floats& weight, int threads) {
    const int64_t n = index.shape(0), channels = features.shape(1), voxels = features.shape(0);
    check(index.ndim() == 2 && index.shape(1) == 8 && weight.size() == index.size(), "devoxelize neighbours");
    Floats out({py::ssize_t(n), py::ssize_t(channels)});
    const float *from = features.data(), *w = weight.data();
    const int32_t* at = index.data();
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    parallel_for(n, kPiece, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            float* __restrict row = to + i * channels;
            std::fill_n(row, channels, 0.0f);
            for (int k = 0; k < 8; k++) {
                const int32_t v = at[8 * i + k];
                if (v < 0) continue;
                check(v < voxels, "devoxelize index");
                const float* __restrict x = from + v * channels;
                const float f = w[8 * i + k];
                for (int64_t c = 0; c < channels; c++) row[c] += f * x[c];
            }
        }
    });
    return out;
}

}  // namespace
}  // namespace edgekit

EDGEKIT_KERNEL(devoxelize, m) {
    m.def("devoxelize_neighbours", &edgekit::neighbours, py::arg("points").noconvert(), py::arg("sites"),
          py::arg("low").noconvert(), py::arg("size").noconvert(), py::arg("center"), py::arg("batch"),
          py::arg("threads"));
    m.def("devoxelize", &edgekit::devoxelize, py::arg("features").noconvert(), py::arg("index").noconvert(),
          py::arg("weight").noconvert(), py::arg("threads"));
}
