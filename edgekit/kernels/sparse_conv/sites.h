// Where a sparse tensor has voxels, and which of them a convolution joins: the rulebook.
//
// Voxels are sorted by (batch, z, y, x). A row (b, z, y) is kept as blocks of 64 cells: one word of bits and the
// number of voxels before it, so that "which voxels lie in this window of x" is a shift and "what are their
// numbers" a population count. A kernel row (dz, dy) meets the blocks in their own order, so all look-ups of a
// pass are a walk along the sorted blocks: no hash, no search. Only the sites that a strided convolution makes
// are collected by hashing, block by block, and sorted once.
#pragma once

#include "common.h"
#include "threads.h"

#include <array>
#include <cstring>
#include <memory>
#include <string>

namespace edgekit {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Stable sort by key, in as many passes of 11 bits as the largest key needs.
inline void radix_sort(std::vector<uint64_t>& keys, std::vector<int32_t>& values) {
    uint64_t largest = 0;
    for (uint64_t k : keys) largest |= k;
    std::vector<uint64_t> keys2(keys.size());
    std::vector<int32_t> values2(values.size());
    for (int shift = 0; shift < 64 && (largest >> shift) != 0; shift += 11) {
        uint32_t at[2049] = {};
        for (uint64_t k : keys) at[((k >> shift) & 2047) + 1]++;
        for (int i = 0; i < 2048; i++) at[i + 1] += at[i];
        for (size_t i = 0; i < keys.size(); i++) {
            const uint32_t to = at[(keys[i] >> shift) & 2047]++;
            keys2[to] = keys[i];
            values2[to] = values[i];
        }
        keys.swap(keys2);
        values.swap(values2);
    }
}

struct Block {
    uint64_t key;    // row * blocks per row + block of x
    uint64_t bits;
    int32_t before;  // voxels of earlier blocks
};

struct Axes {
    int32_t z, y, x;
};

struct Sites {
    Axes shape;
    int32_t batch;
    int64_t row_blocks;
    std::vector<Block> blocks;
    std::vector<int32_t> coordinates;  // [count, 4]

    Sites(Axes shape_, int32_t batch_) : shape(shape_), batch(batch_), row_blocks((shape_.x + 63) / 64) {}

    int64_t count() const { return int64_t(coordinates.size() / 4); }

    uint64_t row(int64_t b, int64_t z, int64_t y) const { return uint64_t((b * shape.z + z) * shape.y + y); }

    // From coordinates in any order. order: which of them each site is. Returns what is wrong, or "".
    std::string assign(const int32_t* from, int64_t n, std::vector<int32_t>& order) {
        std::vector<uint64_t> keys(n);
        order.resize(n);
        bool sorted = true;
        const uint64_t width = uint64_t(row_blocks) * 64;
        for (int64_t i = 0; i < n; i++) {
            const int32_t *c = from + 4 * i;
            if (c[0] < 0 || c[0] >= batch || c[1] < 0 || c[1] >= shape.z || c[2] < 0 || c[2] >= shape.y || c[3] < 0 ||
                c[3] >= shape.x)
                return "row " + std::to_string(i) + " is outside of the grid";
            keys[i] = row(c[0], c[1], c[2]) * width + uint64_t(c[3]);
            order[i] = int32_t(i);
            sorted = sorted && (i == 0 || keys[i - 1] < keys[i]);
        }
        if (!sorted) radix_sort(keys, order);
        for (int64_t i = 1; i < n; i++)
            if (keys[i] == keys[i - 1]) return "row " + std::to_string(order[i]) + " is there twice";
        coordinates.resize(4 * n);
        for (int64_t i = 0; i < n; i++) {
            std::memcpy(&coordinates[4 * i], from + 4 * int64_t(order[i]), 4 * sizeof(int32_t));
            if (blocks.empty() || blocks.back().key != keys[i] / 64) blocks.push_back({keys[i] / 64, 0, int32_t(i)});
            blocks.back().bits |= uint64_t(1) << (keys[i] % 64);
        }
        return "";
    }

    // From blocks that are sorted, `before` not set yet.
    void assign(std::vector<Block>&& sorted) {
        blocks = std::move(sorted);
        int64_t n = 0;
        for (Block& b : blocks) {
            b.before = int32_t(n);
            n += __builtin_popcountll(b.bits);
        }
        check(n <= INT32_MAX, "sparse sites");
        coordinates.resize(4 * n);
        int32_t* c = coordinates.data();
        for (const Block& b : blocks) {
            const uint64_t row = b.key / uint64_t(row_blocks);
            const int32_t x = int32_t(b.key % uint64_t(row_blocks)) * 64, y = int32_t(row % uint64_t(shape.y));
            const int32_t z = int32_t(row / uint64_t(shape.y) % uint64_t(shape.z));
            const int32_t in = int32_t(row / uint64_t(shape.y) / uint64_t(shape.z));
            for (uint64_t bits = b.bits; bits; bits &= bits - 1, c += 4)
                c[0] = in, c[1] = z, c[2] = y, c[3] = x + __builtin_ctzll(bits);
        }
    }
};

struct Window {
    Axes kernel, stride, padding;
};

// Blocks of bits by key, in the order of their first use.
class BlockSet {
public:
    explicit BlockSet(size_t expected) {
        size_t n = 1024;
        while (n < 2 * expected) n *= 2;
        table_.assign(n, -1);
    }

    void add(uint64_t key, uint64_t bits) {
        size_t i = place(key);
        while (table_[i] >= 0 && blocks[table_[i]].key != key) i = (i + 1) & (table_.size() - 1);
        if (table_[i] >= 0) {
            blocks[table_[i]].bits |= bits;
            return;
        }
        table_[i] = int32_t(blocks.size());
        blocks.push_back({key, bits, 0});
        if (2 * blocks.size() > table_.size()) {
            table_.assign(table_.size() * 4, -1);
            for (size_t b = 0; b < blocks.size(); b++) {
                size_t j = place(blocks[b].key);
                while (table_[j] >= 0) j = (j + 1) & (table_.size() - 1);
                table_[j] = int32_t(b);
            }
        }
    }

    std::vector<Block> blocks;

private:
    size_t place(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ull) >> (64 - __builtin_ctzll(table_.size())); }

    std::vector<int32_t> table_;
};

// All o with o * stride - padding + k = i for a k inside the kernel, clipped to [0, n): first and last.
inline std::pair<int64_t, int64_t> reached(int64_t i, int64_t n, int64_t kernel, int64_t stride, int64_t padding) {
    const int64_t first = -floor_div(-(i + padding - kernel + 1), stride), last = floor_div(i + padding, stride);
    return {std::max<int64_t>(0, first), std::min<int64_t>(n - 1, last)};
}

// The sites of a strided convolution: every cell of the output grid whose window holds a voxel.
inline void strided_sites(const Sites& in, const Window& w, Sites& out) {
    BlockSet set(in.blocks.size());
    std::vector<uint64_t> words;
    for (const Block& b : in.blocks) {
        const uint64_t row = b.key / uint64_t(in.row_blocks);
        const int64_t x0 = int64_t(b.key % uint64_t(in.row_blocks)) * 64, y = int64_t(row % uint64_t(in.shape.y));
        const int64_t z = int64_t(row / uint64_t(in.shape.y) % uint64_t(in.shape.z));
        const int64_t batch = int64_t(row / uint64_t(in.shape.y) / uint64_t(in.shape.z));
        const auto [z1, z2] = reached(z, out.shape.z, w.kernel.z, w.stride.z, w.padding.z);
        const auto [y1, y2] = reached(y, out.shape.y, w.kernel.y, w.stride.y, w.padding.y);
        if (z1 > z2 || y1 > y2) continue;
        const int64_t first = reached(x0, out.shape.x, w.kernel.x, w.stride.x, w.padding.x).first / 64;
        const int64_t last = std::max(first, reached(x0 + 63, out.shape.x, w.kernel.x, w.stride.x, w.padding.x).second / 64);
        words.assign(size_t(last - first + 1), 0);
        for (uint64_t bits = b.bits; bits; bits &= bits - 1) {
            const auto [x1, x2] = reached(x0 + __builtin_ctzll(bits), out.shape.x, w.kernel.x, w.stride.x, w.padding.x);
            for (int64_t x = x1; x <= x2; x++) words[size_t(x / 64 - first)] |= uint64_t(1) << (x % 64);
        }
        for (int64_t oz = z1; oz <= z2; oz++)
            for (int64_t oy = y1; oy <= y2; oy++) {
                const uint64_t key = out.row(batch, oz, oy) * uint64_t(out.row_blocks) + uint64_t(first);
                for (size_t i = 0; i < words.size(); i++)
                    if (words[i]) set.add(key + i, words[i]);
            }
    }
    std::vector<uint64_t> keys;
    std::vector<int32_t> order;
    for (size_t i = 0; i < set.blocks.size(); i++) {
        keys.push_back(set.blocks[i].key);
        order.push_back(int32_t(i));
    }
    radix_sort(keys, order);
    std::vector<Block> sorted;
    sorted.reserve(order.size());
    for (int32_t i : order) sorted.push_back(set.blocks[i]);
    out.assign(std::move(sorted));
}

// Pairs (input voxel, output voxel) by kernel position, for tiles of kTile consecutive output voxels:
// those of tile t and position k are start[t * volume + k] .. start[t * volume + k + 1], output rising.
struct Rulebook {
    static constexpr int kTile = 128;

    int32_t volume = 0;
    int64_t inputs = 0, outputs = 0;
    std::vector<int64_t> start;
    std::vector<int32_t> from;  // input voxel
    std::vector<uint8_t> to;    // output voxel within its tile

    int64_t tiles() const { return (outputs + kTile - 1) / kTile; }

    void build(const Sites& in, const Sites& out, const Window& w, int threads);
    void build_inverse(const Rulebook& forward);
};

// One row (dz, dy) of the kernel: where its walk along the blocks of the input is, and the words under the window.
struct Walk {
    int64_t at;         // first block with key >= wanted
    uint64_t low, high; // this block and the next one
    int32_t before;     // voxels before `low`'s first bit
};

inline void Rulebook::build(const Sites& in, const Sites& out, const Window& w, int threads) {
    constexpr int64_t kTilesAtOnce = 16;
    volume = w.kernel.z * w.kernel.y * w.kernel.x;
    inputs = in.count();
    outputs = out.count();
    const int rows = w.kernel.z * w.kernel.y;
    const uint64_t mask = (uint64_t(1) << w.kernel.x) - 1;
    const int64_t n = tiles(), groups = (n + kTilesAtOnce - 1) / kTilesAtOnce, blocks = int64_t(in.blocks.size());
    struct Part {
        std::vector<int32_t> from, counts;
        std::vector<uint8_t> to;
    };
    std::vector<Part> parts(static_cast<size_t>(groups));
    parallel_for(n, kTilesAtOnce, threads, [&](int64_t begin, int64_t end) {
        Part& part = parts[size_t(begin / kTilesAtOnce)];
        part.counts.assign(size_t((end - begin) * volume), 0);
        std::vector<int32_t> from(size_t(volume) * kTile);
        std::vector<uint8_t> to(size_t(volume) * kTile);
        std::vector<Walk> walks(static_cast<size_t>(rows), Walk{-1, 0, 0, 0});
        uint64_t held_row = UINT64_MAX;
        int64_t held_x = INT64_MIN;
        for (int64_t t = begin; t < end; t++) {
            int32_t* counts = &part.counts[size_t((t - begin) * volume)];
            const int64_t first = t * kTile, last = std::min(outputs, first + kTile);
            for (int64_t o = first; o < last; o++) {
                const int32_t* c = &out.coordinates[size_t(4 * o)];
                const uint64_t row = out.row(c[0], c[1], c[2]);
                const int64_t lowest = int64_t(c[3]) * w.stride.x - w.padding.x;
                const int64_t block = floor_div(lowest, 64);
                const int offset = int(lowest - block * 64);
                if (row != held_row || block != held_x) {
                    held_row = row;
                    held_x = block;
                    for (int dz = 0, r = 0; dz < w.kernel.z; dz++)
                        for (int dy = 0; dy < w.kernel.y; dy++, r++) {
                            Walk& walk = walks[size_t(r)];
                            walk.low = walk.high = 0;
                            const int64_t z = int64_t(c[1]) * w.stride.z - w.padding.z + dz;
                            const int64_t y = int64_t(c[2]) * w.stride.y - w.padding.y + dy;
                            if (z < 0 || z >= in.shape.z || y < 0 || y >= in.shape.y) continue;
                            const int64_t base = int64_t(in.row(c[0], z, y)) * in.row_blocks, key = base + block;
                            const uint64_t wanted = uint64_t(block < 0 ? base : key);  // the first of this row on
                            const auto before = [](const Block& b, uint64_t k) { return b.key < k; };
                            if (walk.at < 0)
                                walk.at = std::lower_bound(in.blocks.begin(), in.blocks.end(), wanted, before) - in.blocks.begin();
                            while (walk.at < blocks && in.blocks[size_t(walk.at)].key < wanted) walk.at++;
                            const Block* b = in.blocks.data() + walk.at;
                            const Block* const stop = in.blocks.data() + blocks;
                            if (b == stop) continue;
                            walk.before = b->before;
                            // an output is there because its window reaches into the row: -1 <= block < row_blocks
                            if (block >= 0 && int64_t(b->key) == key) walk.low = b->bits, b++;
                            if (block + 1 < in.row_blocks && b != stop && int64_t(b->key) == key + 1) walk.high = b->bits;
                        }
                }
                const uint64_t below = (uint64_t(1) << offset) - 1;
                for (int r = 0; r < rows; r++) {
                    const Walk& walk = walks[size_t(r)];
                    uint64_t bits = walk.low >> offset;
                    if (offset) bits |= walk.high << (64 - offset);
                    bits &= mask;
                    if (!bits) continue;
                    int32_t i = walk.before + __builtin_popcountll(walk.low & below);
                    for (; bits; bits &= bits - 1, i++) {  // neighbours in x have consecutive numbers
                        const int k = r * w.kernel.x + __builtin_ctzll(bits);
                        const int at = k * kTile + counts[k]++;
                        from[size_t(at)] = i;
                        to[size_t(at)] = uint8_t(o - first);
                    }
                }
            }
            for (int k = 0; k < volume; k++) {
                const size_t at = size_t(k) * kTile, count = size_t(counts[k]);
                part.from.insert(part.from.end(), from.begin() + at, from.begin() + at + count);
                part.to.insert(part.to.end(), to.begin() + at, to.begin() + at + count);
            }
        }
    });
    start.assign(size_t(n * volume + 1), 0);
    std::vector<int64_t> base(size_t(groups) + 1, 0);
    int64_t total = 0, entry = 0;
    for (int64_t g = 0; g < groups; g++) {
        base[size_t(g)] = total;
        for (int32_t count : parts[size_t(g)].counts) {
            start[size_t(entry++)] = total;
            total += count;
        }
    }
    start[size_t(entry)] = total;
    from.resize(size_t(total));
    to.resize(size_t(total));
    parallel_for(groups, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++) {
            const Part& part = parts[size_t(g)];
            std::copy(part.from.begin(), part.from.end(), from.begin() + base[size_t(g)]);
            std::copy(part.to.begin(), part.to.end(), to.begin() + base[size_t(g)]);
        }
    });
}

// Inputs and outputs exchanged: the rulebook of the inverse convolution, back to the sites it came from.
inline void Rulebook::build_inverse(const Rulebook& forward) {
    volume = forward.volume;
    inputs = forward.outputs;
    outputs = forward.inputs;
    start.assign(size_t(tiles() * volume + 1), 0);
    from.resize(forward.from.size());
    to.resize(forward.to.size());
    // by counting: the outputs of one (tile, position) come in rising order, as the forward pairs did
    for (int round = 0; round < 2; round++) {
        for (int64_t t = 0; t < forward.tiles(); t++)
            for (int k = 0; k < volume; k++)
                for (int64_t i = forward.start[size_t(t * volume + k)]; i < forward.start[size_t(t * volume + k + 1)]; i++) {
                    const int64_t out = forward.from[size_t(i)];
                    const size_t list = size_t(out / kTile * volume + k);
                    if (round == 0) {
                        start[list + 1]++;
                    } else {
                        const int64_t at = start[list]++;
                        from[size_t(at)] = int32_t(t * kTile + forward.to[size_t(i)]);
                        to[size_t(at)] = uint8_t(out % kTile);
                    }
                }
        if (round == 0)
            for (size_t i = 1; i < start.size(); i++) start[i] += start[i - 1];
    }
    for (size_t i = start.size() - 1; i > 0; i--) start[i] = start[i - 1];
    start[0] = 0;
}

}  // namespace edgekit
