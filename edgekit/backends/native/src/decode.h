// From a network's raw outputs to boxes or classes: the tables of edgekit.tasks.detect.spec and classify.spec, and the decoder and
// NMS that Python uses too (kernels/decode/decoder.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../include/edgekit.h"
#include "json.h"
#include "preprocess.h"

namespace edgekit {

enum class HeadFamily { yolox, yolov5, yolov8, nanodet, fastestdet, rows };

// Channels from `start` on of the output `tensor`; no name: not there.
struct HeadChannels {
    std::string tensor;
    int start = 0;
};

struct HeadLevel {
    int stride = 0;
    HeadChannels box, classes, objectness;
    std::vector<std::pair<double, double>> anchors;
};

// `DetectSpec` with its `DetectHead`.
struct DetectSpec {
    ImageRule rule;
    HeadFamily family = HeadFamily::yolox;
    int classes = 0, bins = 0;
    double cell_offset = 0;
    std::vector<HeadLevel> levels;
    std::string rows;
    std::vector<std::string> columns, labels;
    bool transposed = false, normalized = false;
    double score_threshold = 0.25, iou_threshold = 0.65;
    int max_detections = 300;

    static DetectSpec read(const Value& pipeline);  // throws Error
};

// `ClassifySpec`.
struct ClassifySpec {
    ImageRule rule;
    std::string output;
    std::vector<std::string> labels;
    bool softmax = true;
    int top_k = 5;
    double score_threshold = 0;

    static ClassifySpec read(const Value& pipeline);  // throws Error
};

// An output of a session: what it is, and where it lies.
struct OutputPort {
    ek_port port;
    const void* memory;
};

// Boxes of one session's outputs; for one thread at a time.
class BoxDecoder {
  public:
    // Throws Error where the head does not fit the outputs.
    BoxDecoder(const DetectSpec& spec, const std::vector<OutputPort>& outputs);
    ~BoxDecoder();

    struct Limits {
        float score, overlap;
        int most;
    };
    // Boxes in pixels of a picture of width x height that lies at `at`, best first, clipped to it.
    void run(const Limits& limits, const Placement& at, uint32_t width, uint32_t height, std::vector<ek_box>& boxes);

  private:
    struct Work;
    HeadFamily family_;
    std::unique_ptr<Work> work_;
};

// Scores of all classes, then the best ones in order.
void classify(const ClassifySpec& spec, const float* values, std::vector<float>& scores, std::vector<ek_class>& best);

}  // namespace edgekit
