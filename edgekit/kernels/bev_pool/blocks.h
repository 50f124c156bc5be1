// The association table in the order in which a CPU works best: block by block of cells, whose sums stay in the second
// cache, and within a block column by column of features, which stay in the first. Sums come out the same bits: each
// cell still sees its runs in the table's order.
#pragma once

#include "common.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace edgekit {

constexpr int kCountBits = 16;
constexpr int kLine = 16;  // floats of a cache line

struct Run {
    uint32_t depth, pixel, rows;  // rows: camera << 16 | number of them
};

// A run and the cell of its block that it adds to.
struct BlockRun {
    Run run;
    uint32_t cell;
};

// Consecutive cells of one block, at `local` among its cells.
struct Segment {
    int64_t first;
    int32_t count, local;
};

struct Block {
    int64_t runs, runs_end;
    int32_t segments, segments_end, cells;
};

struct Blocks {
    std::vector<Block> blocks;
    std::vector<BlockRun> runs;
    std::vector<Segment> segments;
};

constexpr int kBlockColumns = 32;

// Rows of a block's cells, whose sums are to fill a third of the second cache. Bits do not depend on it.
inline int block_rows(int channels) {
    long cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (cache <= 0) cache = 512 << 10;  // ARM's systems do not say
    return int(std::clamp<long>(cache / 3 / (kBlockColumns * long(sizeof(float)) * channels), 4, 32));
}

// By (camera, column, depth bin, row), the order of sums.
inline void sort_runs(std::vector<BlockRun>& list, int height, int width) {
    const uint32_t w = uint32_t(width), plane = w * uint32_t(height);
    std::vector<std::pair<uint64_t, uint32_t>> keys(list.size());
    for (size_t i = 0; i < list.size(); i++) {
        const Run& run = list[i].run;
        const uint64_t column = uint64_t(run.rows >> kCountBits) * w + run.pixel % w;
        keys[i] = {column << 44 | uint64_t(run.depth / plane) << 16 | run.depth % plane / w, uint32_t(i)};
    }
    std::sort(keys.begin(), keys.end());
    std::vector<BlockRun> sorted(list.size());
    for (size_t i = 0; i < list.size(); i++) sorted[i] = list[keys[i].second];
    list.swap(sorted);
}

// The table's runs again. start: [cells + 1], columns: of the grid, height and width: of the features, into: floats from
// the beginning of a cache line to cell 0 in memory. Segments begin where lines do, where planes lie alike on them.
inline Blocks cut(const int32_t* start, const Run* run, int64_t cells, int columns, int height, int width, int into,
                  int block_rows) {
    Blocks made;
    const int64_t rows = cells / columns, across = (columns + kBlockColumns - 1) / kBlockColumns;
    const int64_t line = cells % kLine == 0 ? kLine : 1;
    const auto border = [&](int64_t row, int64_t k) {  // of the k-th block in `row`
        const int64_t cell = row * columns + std::min<int64_t>(k * kBlockColumns, columns);
        return std::max<int64_t>(0, (cell + into) / line * line - into);
    };
    std::vector<BlockRun> list;
    for (int64_t top = 0; top < rows; top += block_rows)
        for (int64_t k = 0; k < across; k++) {
            Block block{};
            block.segments = int32_t(made.segments.size());
            list.clear();
            for (int64_t row = top; row < std::min<int64_t>(rows, top + block_rows); row++) {
                // the last border of a row is the first of the next one
                const bool last = row + 1 == rows && k + 1 == across;
                const int64_t first = border(row, k), end = last ? cells : border(row, k + 1);
                if (first == end) continue;
                made.segments.push_back({first, int32_t(end - first), block.cells});
                for (int64_t cell = first; cell < end; cell++, block.cells++)
                    for (int32_t r = start[cell]; r < start[cell + 1]; r++)
                        list.push_back({run[r], uint32_t(block.cells)});
            }
            if (block.cells == 0) continue;
            block.segments_end = int32_t(made.segments.size());
            block.runs = int64_t(made.runs.size());
            sort_runs(list, height, width);
            made.runs.insert(made.runs.end(), list.begin(), list.end());
            block.runs_end = int64_t(made.runs.size());
            made.blocks.push_back(block);
        }
    // the longest first: threads then end together
    std::stable_sort(made.blocks.begin(), made.blocks.end(), [](const Block& a, const Block& b) {
        return a.runs_end - a.runs > b.runs_end - b.runs;
    });
    return made;
}

}  // namespace edgekit
