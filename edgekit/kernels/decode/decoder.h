// Decoding of detector heads, suppression and the way back to the picture in one call. reference.py defines the
// arithmetic; this follows it operation by operation (it is compiled with contraction off), so that both give the
// same bits anywhere. Cells that pass the screen are collected and computed 8 at a time.
#pragma once

#include "../nms/nms.h"
#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace edgekit {
namespace {

constexpr double kSqrtHalf = 0.7071067811865476;
constexpr int kBatch = 256, kTile = 2048;

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

inline int padded(int n) { return (n + 7) & ~7; }

// One float32 tensor [1, C, H, W] with any strides, in bytes.
struct View {
    const char* base;
    ptrdiff_t channel, row, column;
    int channels, height, width;

    const char* at(int c, int y, int x) const { return base + c * channel + y * row + x * column; }
    // Whether rows follow each other like columns, so that a grid is one long row.
    bool flat() const { return height == 1 || row == column * width; }
};

enum class Family { yolox, yolov5, distribution, fastestdet, rows };

struct Grid {
    Family family;
    int height, width, bins, num_classes;
    double stride, offset, anchor[2], scale[2];
    int box_tensor, box[4], class_tensor, class_start, object_tensor, object_start, score, label;
    bool corners;
};

inline float number(const char* p) { return *reinterpret_cast<const float*>(p); }

// A cell that may reach the threshold; with all_classes one of them per class.
struct Entry {
    int y, x;
    int32_t label;
    float value, best;  // raw value of `label`, and of the cell's best class
};

// What detection asks of a candidate.
struct Limits {
    float threshold, low_object, low_class;  // of the score; of raw values, below which no score can reach it (reference.py: screen)
    bool all_classes;                        // every such class of a cell, not only its best one
};

// Offset, scale and limit of x1 y1 x2 y2: (box - offset) / scale lies in the picture.
struct ToPicture {
    float offset[4], scale[4], limit[4];
    bool clip;  // to 0..limit
};

class Decoder {
public:
    Decoder(std::vector<Grid> grids, Isa isa) : isa_(isa), nms_(isa_), grids_(std::move(grids)) {
        for (const Grid& grid : grids_) {
            bins_ = std::max(bins_, grid.bins);
            top_class_ = std::max(top_class_, grid.num_classes - 1);
        }
        logits_.resize(size_t(8) * bins_);
        work_.resize(size_t(8) * bins_);
        exp_ = EDGEKIT_PICK(exp_all, isa_);
        bins_of_ = EDGEKIT_PICK(expected_bins, isa_);
        any_ = EDGEKIT_PICK(any_above, isa_);
        tile_ = EDGEKIT_PICK(best_of_tile, isa_);
        planes_ = EDGEKIT_PICK(best_of_planes, isa_);
        row_ = EDGEKIT_PICK(best_of_row, isa_);
    }

    // The tensors of the next calls.
    void bind(std::vector<View> views) {
        views_ = std::move(views);
        for (const Grid& g : grids_) check(fits(g), "decode grid");
    }

    // Candidates, how many: boxes() [n, 4], scores() [n], classes() [n].
    int decode(const Limits& limits) {
        all_classes_ = limits.all_classes;
        threshold_ = limits.threshold, low_object_ = limits.low_object, low_class_ = limits.low_class;
        found_ = 0;
        for (const Grid& g : grids_) {
            screen(g);
            flush(g);
        }
        return found_;
    }

    // How many of them nms keeps, as kept(); -1 for a class out of range.
    int suppress(float iou_threshold, int max_detections, int max_candidates) {
        return nms_.run(boxes_.data(), scores_.data(), classes_.data(), found_, iou_threshold, max_detections,
                        max_candidates, top_class_);
    }

    const float* boxes() const { return boxes_.data(); }
    const float* scores() const { return scores_.data(); }
    const int32_t* classes() const { return classes_.data(); }
    const int32_t* kept() const { return nms_.kept(); }

    // Candidate i in pixels of the picture.
    void place(int i, const ToPicture& to, float* box) const {
        const float* b = boxes_.data() + size_t(4) * i;
        for (int k = 0; k < 4; k++) {
            float v = (b[k] - to.offset[k]) / to.scale[k];
            if (to.clip) {
                v = v > 0.0f ? v : 0.0f;
                v = v < to.limit[k] ? v : to.limit[k];
            }
            box[k] = v;
        }
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

    // Stretches of at most kTile cells of one row, or of the whole grid where it lies like one.
    void screen(const Grid& g) {
        const View& v = views_[g.object_tensor >= 0 ? g.object_tensor : g.score >= 0 ? g.box_tensor : g.class_tensor];
        const int rows = v.flat() ? 1 : g.height, columns = g.height * g.width / rows;
        for (int y = 0; y < rows; y++)
            for (int x = 0; x < columns; x += kTile) {
                const int n = std::min(kTile, columns - x);
                int count;
                if (g.object_tensor >= 0) count = above(v.at(g.object_start, y, x), v.column, n, low_object_);
                else if (g.score >= 0) count = above(v.at(g.score, y, x), v.column, n, low_class_);
                else count = above_any_class(g, v, y, x, n);
                label(g, y * g.width + x, count);
            }
    }

    // Which of n cells have a value of at least `low` (never NaN), into cells_.
    int above(const char* p, ptrdiff_t step, int n, float low) {
        int count = 0, i = 0;
        for (; step == 4 && i + 16 <= n; i += 16, p += 64) {
            if (!any_(reinterpret_cast<const float*>(p), low)) continue;
            for (int k = 0; k < 16; k++) {
                cells_[count] = i + k;
                count += number(p + 4 * k) >= low;
            }
        }
        for (; i < n; i++, p += step) {
            cells_[count] = i;
            count += number(p) >= low;
        }
        return count;
    }

    int above_any_class(const Grid& g, const View& v, int y, int x, int n) {
        const char* p = v.at(g.class_start, y, x);
        if (v.column == 4) {
            tile_(p, v.channel, g.num_classes, n, best_, labels_);
        } else {
            for (int i = 0; i < n; i++, p += v.column) best_[i] = best_class(g, v, p, labels_ + i);
        }
        return above(reinterpret_cast<const char*>(best_), 4, n, low_class_);
    }

    // Best class of one cell, the first of equals; -inf and 0 where all are NaN. p: its first class.
    float best_class(const Grid& g, const View& v, const char* p, int32_t* label) const {
        if (v.channel == 4) return row_(reinterpret_cast<const float*>(p), g.num_classes, label);
        float best = -std::numeric_limits<float>::infinity();
        *label = 0;
        for (int c = 0; c < g.num_classes; c++, p += v.channel)
            if (number(p) > best) best = number(p), *label = c;
        return best;
    }

    // Cells_, counted from cell `first` of the grid, become entries: their best class, or every class.
    void label(const Grid& g, int first, int count) {
        const View& v = views_[g.score >= 0 ? g.box_tensor : g.class_tensor];
        const bool planes = v.column == 4 && v.flat();
        float values[8];
        int32_t labels[8];
        int block = -1;  // cells whose best class is in values, labels
        for (int k = 0; k < count; k++) {
            const int cell = first + cells_[k], y = cell / g.width, x = cell - y * g.width;
            Entry e{y, x, 0, 0, -std::numeric_limits<float>::infinity()};
            if (g.score >= 0) {
                e.best = number(v.at(g.score, y, x));
                if (g.label >= 0) {
                    const double named = std::nearbyint(double(number(v.at(g.label, y, x))));
                    if (!(named >= 0 && named < g.num_classes)) continue;
                    e.label = int32_t(named);
                }
            } else if (g.object_tensor < 0) {  // seen by the screen
                e.best = best_[cells_[k]], e.label = labels_[cells_[k]];
            } else if (planes && (cell & ~7) + 8 <= g.height * g.width) {
                if (block != (cell & ~7)) {
                    block = cell & ~7;
                    planes_(v.at(g.class_start, 0, 0) + ptrdiff_t(4) * block, v.channel, g.num_classes, values, labels);
                }
                e.best = values[cell & 7], e.label = labels[cell & 7];
            } else {
                e.best = best_class(g, v, v.at(g.class_start, y, x), &e.label);
            }
            if (!(e.best >= low_class_)) continue;
            e.value = e.best;
            if (!all_classes_ || g.score >= 0) {
                add(g, e);
                continue;
            }
            const char* p = v.at(g.class_start, y, x);
            for (int c = 0; c < g.num_classes; c++, p += v.channel) {
                e.value = number(p), e.label = c;
                if (e.value >= low_class_) add(g, e);
            }
        }
    }

    void add(const Grid& g, const Entry& e) {
        entries_[waiting_++] = e;
        if (waiting_ == kBatch) flush(g);
    }

    // Entries to candidates.
    void flush(const Grid& g) {
        const int n = waiting_;
        waiting_ = 0;
        if (n == 0) return;
        class_scores(g, n);
        int good = 0;
        for (int i = 0; i < n; i++) {
            const float score = float(exact_[i]);
            if (!(score >= threshold_ && score > 0 && std::isfinite(score))) continue;
            entries_[good] = entries_[i];
            score_[good++] = score;
        }
        if (boxes_.size() < size_t(4) * (found_ + kBatch)) {
            const size_t room = std::max<size_t>(found_ + kBatch, scores_.size() * 2);
            boxes_.resize(4 * room), scores_.resize(room), classes_.resize(room);
        }
        for (int i = 0; i < good; i += 8) {
            const int count = std::min(8, good - i);
            float boxes[8][4];
            if (i + 8 < good) fetch(g, entries_ + i + 8, std::min(8, good - i - 8));
            cell_boxes(g, entries_ + i, count, boxes);
            for (int k = 0; k < count; k++) {
                const float* b = boxes[k];
                if (!(std::isfinite(b[0]) && std::isfinite(b[1]) && std::isfinite(b[2]) && std::isfinite(b[3]))) continue;
                std::copy_n(b, 4, boxes_.data() + size_t(4) * found_);
                scores_[found_] = score_[i + k];
                classes_[found_++] = entries_[i + k].label;
            }
        }
    }

    // In place, n of them; room up to the next multiple of 8.
    void sigmoid(double* x, int n) const {
        for (int i = 0; i < n; i++) x[i] = -x[i];
        exp_(x, padded(n));
        for (int i = 0; i < n; i++) x[i] = 1.0 / (1.0 + x[i]);
    }

    double exp_one(double x) const {
        double lanes[8] = {x};
        exp_(lanes, 8);
        return lanes[0];
    }

    double softmax_total(const Grid& g, const Entry& e) const {
        const View& v = views_[g.class_tensor];
        double total = 0.0, terms[8] = {};
        for (int c = 0; c < g.num_classes; c += 8) {
            const int n = std::min(8, g.num_classes - c);
            for (int k = 0; k < n; k++) {
                const double value = number(v.at(g.class_start + c + k, e.y, e.x));
                terms[k] = (value != value ? -kInf : value) - double(e.best);
            }
            exp_(terms, 8);
            for (int k = 0; k < n; k++) total = total + terms[k];
        }
        return total;
    }

    // Scores of entries_ into exact_.
    void class_scores(const Grid& g, int n) {
        const bool object = g.object_tensor >= 0;
        if (object) {
            const View& v = views_[g.object_tensor];
            for (int i = 0; i < n; i++) object_[i] = number(v.at(g.object_start, entries_[i].y, entries_[i].x));
        }
        for (int i = 0; i < n; i++) exact_[i] = entries_[i].value;
        if (g.family == Family::fastestdet) {
            sigmoid(object_, n);
            for (int i = 0; i < n; i++) {
                const Entry& e = entries_[i];
                const double share = exp_one(exact_[i] - double(e.best)) / softmax_total(g, e);
                exact_[i] = exp_one(0.6 * log64(object_[i]) + 0.4 * log64(share));
            }
            return;
        }
        if (g.family != Family::rows) {
            sigmoid(exact_, n);
            if (object) sigmoid(object_, n);
        }
        if (object)
            for (int i = 0; i < n; i++) exact_[i] = object_[i] * exact_[i];
    }

    // Value of channel c of 8 cells.
    template <class T>
    static void gather(const View& v, int c, const ptrdiff_t* at, T* out) {
        const char* p = v.base + c * v.channel;
        for (int k = 0; k < 8; k++) out[k] = T(number(p + at[k]));
    }

    // Asks for the box values of the next cells while these are computed: each channel is another cache line.
    void fetch(const Grid& g, const Entry* entries, int count) const {
        const View& v = views_[g.box_tensor];
        const int channels = std::max(1, g.bins);
        const char* before = nullptr;
        for (int k = 0; k < count; k++) {
            const char* cell = v.base + entries[k].y * v.row + entries[k].x * v.column;
            const bool near = cell >= before && cell - before < 64 && k > 0;
            if (near && k + 1 < count) continue;
            before = cell;
            for (int side = 0; side < 4; side++)
                for (int b = 0; b < channels; b++) __builtin_prefetch(cell + (g.box[side] + b) * v.channel, 0, 2);
        }
    }

    // Boxes of at most 8 cells.
    void cell_boxes(const Grid& g, const Entry* entries, int count, float (*boxes)[4]) {
        const View& v = views_[g.box_tensor];
        ptrdiff_t at[8];
        for (int k = 0; k < 8; k++) {
            const Entry& e = entries[std::min(k, count - 1)];  // lanes to spare repeat the last cell
            at[k] = e.y * v.row + e.x * v.column;
        }
        if (g.family == Family::distribution) {
            float side[4][8];
            for (int k = 0; k < 4; k++) {
                for (int b = 0; b < g.bins; b++) gather(v, g.box[k] + b, at, logits_.data() + 8 * b);
                bins_of_(logits_.data(), g.bins, work_.data(), side[k]);
            }
            for (int k = 0; k < count; k++) {
                const double cx = entries[k].x + g.offset, cy = entries[k].y + g.offset;
                boxes[k][0] = float((cx - double(side[0][k])) * g.stride);
                boxes[k][1] = float((cy - double(side[1][k])) * g.stride);
                boxes[k][2] = float((cx + double(side[2][k])) * g.stride);
                boxes[k][3] = float((cy + double(side[3][k])) * g.stride);
            }
            return;
        }
        double t[4][8];
        for (int k = 0; k < 4; k++) gather(v, g.box[k], at, t[k]);
        if (g.family == Family::yolox) exp_(t[2], 16);
        if (g.family == Family::yolov5) sigmoid(t[0], 32);
        if (g.family == Family::fastestdet) {
            tanh(t[0], 16);
            sigmoid(t[2], 16);
        }
        for (int k = 0; k < count; k++) {
            const double a = t[0][k], b = t[1][k], c = t[2][k], d = t[3][k];
            const int x = entries[k].x, y = entries[k].y;
            double cx, cy, w, h;
            if (g.family == Family::yolox) {
                cx = (a + x) * g.stride, cy = (b + y) * g.stride;
                w = c * g.stride, h = d * g.stride;
            } else if (g.family == Family::yolov5) {
                cx = (2.0 * a - 0.5 + x) * g.stride, cy = (2.0 * b - 0.5 + y) * g.stride;
                const double p = 2.0 * c, q = 2.0 * d;
                w = p * p * g.anchor[0], h = q * q * g.anchor[1];
            } else if (g.family == Family::fastestdet) {
                cx = (x + a) * g.stride, cy = (y + b) * g.stride;
                w = c * g.scale[0], h = d * g.scale[1];
            } else {
                cx = a * g.scale[0], cy = b * g.scale[1], w = c * g.scale[0], h = d * g.scale[1];
                if (g.corners) {
                    boxes[k][0] = float(cx), boxes[k][1] = float(cy), boxes[k][2] = float(w), boxes[k][3] = float(h);
                    continue;
                }
            }
            boxes[k][0] = float(cx - 0.5 * w), boxes[k][1] = float(cy - 0.5 * h);
            boxes[k][2] = float(cx + 0.5 * w), boxes[k][3] = float(cy + 0.5 * h);
        }
    }

    void tanh(double* x, int n) const {
        double e[16];
        for (int i = 0; i < n; i++) e[i] = -2.0 * std::fabs(x[i]);
        exp_(e, n);
        for (int i = 0; i < n; i++) x[i] = std::copysign((1.0 - e[i]) / (1.0 + e[i]), x[i]);
    }

    Isa isa_;
    Nms nms_;
    void (*exp_)(double*, int);
    void (*bins_of_)(const float*, int, float*, float*);
    bool (*any_)(const float*, float);
    void (*tile_)(const char*, ptrdiff_t, int, int, float*, int32_t*);
    void (*planes_)(const char*, ptrdiff_t, int, float*, int32_t*);
    float (*row_)(const float*, int, int32_t*);
    std::vector<Grid> grids_;
    std::vector<View> views_;
    int bins_ = 1, top_class_ = 0, found_ = 0, waiting_ = 0;
    bool all_classes_ = false;
    float threshold_ = 0, low_object_ = 0, low_class_ = 0;
    int cells_[kTile + 1];  // one past the last may be written
    float best_[kTile];  // of the tile's cells, where the classes are the screen
    int32_t labels_[kTile];
    Entry entries_[kBatch];
    double exact_[kBatch], object_[kBatch];
    float score_[kBatch];
    std::vector<float> logits_, work_;  // [bins][8]
    std::vector<float> boxes_, scores_;  // candidates
    std::vector<int32_t> classes_;
};

}  // namespace
}  // namespace edgekit
