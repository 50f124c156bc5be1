// Greedy class-aware NMS; reference.py states the rule. Kept boxes lie in blocks of 8 chained by class, so a
// box is compared with those of its own class only, 8 at a time, and no class offsets distort coordinates.
#pragma once

#include "../vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace edgekit {

struct KeptBlock {
    float x1[8], y1[8], x2[8], y2[8], area[8];
    int used, next;  // next: the block filled before it in the same class, or -1
};

// Whether one of the block's boxes overlaps `box` by more than `threshold`. Lanes not yet used hold zeros:
// an empty box, which never does.
template <int B>
EDGEKIT_INLINE bool overlaps(const KeptBlock& k, const float* box, float area, float threshold) {
    using F = typename V<B>::F;
    typename V<B>::I hit{};
    for (int i = 0; i < 8; i += V<B>::kFloats) {
        const F x1 = load<F>(k.x1 + i), y1 = load<F>(k.y1 + i), x2 = load<F>(k.x2 + i), y2 = load<F>(k.y2 + i);
        const F zero{}, bx1 = zero + box[0], by1 = zero + box[1], bx2 = zero + box[2], by2 = zero + box[3];
        F w = (x2 < bx2 ? x2 : bx2) - (x1 > bx1 ? x1 : bx1), h = (y2 < by2 ? y2 : by2) - (y1 > by1 ? y1 : by1);
        w = w > zero ? w : zero, h = h > zero ? h : zero;
        const F inter = w * h;
        hit |= inter > threshold * (load<F>(k.area + i) + area - inter);
    }
    return any<B>(hit);
}

EDGEKIT_LANES(bool, overlaps, (const KeptBlock& k, const float* box, float area, float threshold),
              (k, box, area, threshold))

// The buffers of one thread, grown once: nothing is allocated per call.
class Nms {
public:
    explicit Nms(Isa isa) : overlaps_(EDGEKIT_PICK(overlaps, isa)) {}

    // How many boxes are kept, their indices in kept(), best first; -1 for a class outside 0..max_class.
    int run(const float* boxes, const float* scores, const int32_t* classes, int n, float threshold,
            int max_detections, int max_candidates, int max_class) {
        order_.clear();
        kept_.clear();
        blocks_.clear();
        int32_t top_class = -1;
        for (int i = 0; i < n; i++) {
            const float* b = boxes + size_t(4) * i;
            if (classes[i] < 0 || classes[i] > max_class) return -1;
            if (scores[i] != scores[i]) continue;
            if (!(std::isfinite(b[0]) && std::isfinite(b[1]) && std::isfinite(b[2]) && std::isfinite(b[3]))) continue;
            order_.push_back(uint64_t(rank(scores[i])) << 32 | uint32_t(i));
            top_class = std::max(top_class, classes[i]);
        }
        sort();
        if (order_.size() > size_t(max_candidates)) order_.resize(max_candidates);
        last_.assign(size_t(top_class) + 1, -1);
        for (const uint64_t item : order_) {
            if (int(kept_.size()) >= max_detections) break;
            const int32_t i = int32_t(uint32_t(item));
            const float* b = boxes + size_t(4) * i;
            const float area = std::max(b[2] - b[0], 0.0f) * std::max(b[3] - b[1], 0.0f);
            int k = last_[classes[i]];
            while (k >= 0 && !overlaps_(blocks_[k], b, area, threshold)) k = blocks_[k].next;
            if (k < 0) keep(i, b, area, last_[classes[i]]);
        }
        return int(kept_.size());
    }

    const int32_t* kept() const { return kept_.data(); }

private:
    // Falls as the score rises, equal for equal scores (so for both zeros).
    static uint32_t rank(float score) {
        uint32_t bits;
        score += 0.0f;
        std::memcpy(&bits, &score, 4);
        return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
    }

    // By rank, equal ones in the order they have: a stable sort byte by byte, but for few items.
    void sort() {
        const size_t n = order_.size();
        if (n < 64) {
            std::sort(order_.begin(), order_.end());
            return;
        }
        uint32_t start[4][256] = {};
        for (const uint64_t item : order_)
            for (int d = 0; d < 4; d++) start[d][item >> (32 + 8 * d) & 255]++;
        other_.resize(n);
        for (int d = 0; d < 4; d++) {
            if (start[d][order_[0] >> (32 + 8 * d) & 255] == n) continue;  // the same byte in all
            uint32_t at = 0;
            for (uint32_t& s : start[d]) {
                const uint32_t size = s;
                s = at;
                at += size;
            }
            for (const uint64_t item : order_) other_[start[d][item >> (32 + 8 * d) & 255]++] = item;
            order_.swap(other_);
        }
    }

    void keep(int32_t i, const float* b, float area, int& last) {
        kept_.push_back(i);
        if (last < 0 || blocks_[last].used == 8) {
            blocks_.push_back(KeptBlock{});
            blocks_.back().next = last;
            last = int(blocks_.size()) - 1;
        }
        KeptBlock& k = blocks_[last];
        k.x1[k.used] = b[0], k.y1[k.used] = b[1], k.x2[k.used] = b[2], k.y2[k.used] = b[3];
        k.area[k.used++] = area;
    }

    bool (*overlaps_)(const KeptBlock&, const float*, float, float);
    std::vector<uint64_t> order_, other_;  // rank, then index
    std::vector<int32_t> kept_;
    std::vector<KeptBlock> blocks_;
    std::vector<int> last_;  // by class: its newest block, or -1
};

}  // namespace edgekit
