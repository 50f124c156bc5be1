// From a camera's picture to the network's input: the rule of a bundle (edgekit.tasks.preprocess), by the kernel that Python
// uses too (kernels/letterbox/letterbox.h), straight into the engine's memory.
#pragma once

#include <cstdint>
#include <memory>

#include "../include/edgekit.h"
#include "json.h"

namespace edgekit {

enum class Resize { letterbox, letterbox_center, stretch, crop, crop_bottom };

// `ImagePreprocess` of edgekit.tasks.preprocess.
struct ImageRule {
    int width = 0, height = 0;  // of the network's input
    Resize resize = Resize::letterbox;
    int pad_value = 114;
    bool rgb = false;
    float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};
    bool nhwc = false;  // what sessions see
    int shorter_side = 0, scaled_width = 0;  // 0: not given
    bool area = false;

    static ImageRule read(const Value& table);  // throws Error
};

// Where a picture lies in the network's input: x_in = x * scale_x + left.
struct Placement {
    double scale_x, scale_y;
    int left, top, width, height;
};

Placement place(const ImageRule& rule, int width, int height);

// The code that an input which takes codes has for a number: edgekit.input_codes, and so the engine's own `quantize`.
uint8_t input_code(float x, const ek_port& port);

// One input of one session; for one thread at a time. Tables are kept until a picture of another layout comes.
class PictureInput {
  public:
    // port: float32, or codes; NCHW or NHWC as it lies. memory: the port's. Throws Error where the rule does not fit it.
    PictureInput(const ImageRule& rule, const ek_port& port, void* memory);
    ~PictureInput();

    // Throws Error, EK_BAD_ARGUMENT, for what is no picture; nothing is allocated where the last one's layout was the same.
    const Placement& write(const ek_picture& picture);

  private:
    struct Plan;
    ImageRule rule_;
    ek_port port_;
    uint8_t* memory_;
    bool nhwc_;  // as it lies
    std::unique_ptr<Plan> plan_;
    bool padded_ = false;  // the memory holds the padding of plan_
};

}  // namespace edgekit
