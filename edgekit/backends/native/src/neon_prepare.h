// Preparing the aarch64 convolutions: how units are cut, constants as the kernels read them, which kernel runs.
#pragma once

#include "neon_run.h"

namespace edgekit {
namespace {

// Sums over the weights of an output channel: as they are, and without their signs.
struct Weighed {
    int32_t sum = 0, magnitude = 0;
    Weighed(const int8_t* weights, int count) {
        for (int i = 0; i < count; i++) sum += weights[i], magnitude += weights[i] < 0 ? -weights[i] : weights[i];
    }
};

// bias + what the zero point and the flip of the codes add: sum((q - zero) w) = sum((q - flip) w) + (flip - zero) sum(w)
template <typename Core> int32_t full_bias(const Step& step, int32_t bias, const Weighed& weights) {
    const int32_t shift = static_cast<int32_t>(Core::kFlip) - step.in[0].zero;
    return static_cast<int32_t>(static_cast<uint32_t>(bias) + static_cast<uint32_t>(shift) * static_cast<uint32_t>(weights.sum));
}

// false: a curve that these kernels do not take.
inline bool prepare_tables(const Step& step, Conv& conv, Store& store) {
    conv.zero = step.act == Act::kTable ? step.ints[0] : step.in[1].c ? step.ints[1] : step.out[0].zero;
    if (step.act == Act::kTable) {
        conv.tables = step.constants[3];
    }
    if (step.act != Act::kCurve) return true;
    const int16_t* curve = reinterpret_cast<const int16_t*>(step.constants[3]);
    uint8_t* planes = store.bytes(256);
    for (int i = 0; i < 64; i++) {
        const int slope = curve[64 + i], base = curve[i] + i % 2 * slope;
        if (base < -32768 || base > 32767 || slope == -32768) return false;
        planes[i] = static_cast<uint8_t>(base & 255), planes[64 + i] = static_cast<uint8_t>(base >> 8 & 255);
        planes[128 + i] = static_cast<uint8_t>(slope & 255), planes[192 + i] = static_cast<uint8_t>(slope >> 8 & 255);
    }
    conv.tables = planes;
    return true;
}

// Whether sqrdmulh by `factor` makes the same codes of sums as rounded() by m. Both only step up, so they need to from the same
// sum on to each code, or beyond `least` and `most`.
inline bool same_steps(float m, int32_t factor, int zero, int32_t least, int32_t most) {
    const int32x4_t f = vdupq_n_s32(factor), one = vdupq_n_s32(1);
    const float32x4_t by = vdupq_n_f32(m), inverse = vdupq_n_f32(1.0f / m);
    // relative to a sum: how far roundings, here and in either product, can move a step
    const float32x4_t doubt = vdupq_n_f32(0x1p-21f + 1.0f / static_cast<float>(factor));
    const auto above = [&](int32x4_t sum, int32x4_t code) {
        return vandq_u32(vcgtq_s32(rounded(sum, by), code), vcgtq_s32(vqrdmulhq_s32(sum, f), code));
    };
    const auto below = [&](int32x4_t sum, int32x4_t code) {
        return vandq_u32(vcleq_s32(rounded(sum, by), code), vcleq_s32(vqrdmulhq_s32(sum, f), code));
    };
    static const float kTies[] = {0.5f, 1.5f, 2.5f, 3.5f};
    float32x4_t tie = vsubq_f32(vld1q_f32(kTies), vdupq_n_f32(static_cast<float>(zero)));
    for (int i = 0; i < 256; i += 4, tie = vaddq_f32(tie, vdupq_n_f32(4.0f))) {
        const float32x4_t at = vmulq_f32(tie, inverse), nearest = vrndnq_f32(at);
        if (vminvq_u32(vcagtq_f32(vsubq_f32(at, nearest), vmulq_f32(at, doubt)))) continue;  // no sum is that near
        const int32x4_t code = vcvtmq_s32_f32(tie);
        int32x4_t sum = vcvtq_s32_f32(nearest);
        sum = vaddq_s32(sum, vreinterpretq_s32_u32(vandq_u32(vcleq_s32(rounded(sum, by), code), vreinterpretq_u32_s32(one))));
        const uint32x4_t here = vandq_u32(above(sum, code), below(vsubq_s32(sum, one), code));
        const uint32x4_t never = vorrq_u32(above(vdupq_n_s32(least), code), below(vdupq_n_s32(most), code));
        if (vminvq_u32(vorrq_u32(here, never)) == 0) return false;
    }
    return true;
}

template <typename Core, Mode kMode> void choose_run(Step& step, const Conv& conv) {
    if (conv.three) step.run = Core::template three<kMode == Mode::kCodes || kMode == Mode::kTable ? kMode : Mode::kRaw>();
    else if (conv.depthwise) step.run = run_depthwise<Core, kMode == Mode::kCodes || kMode == Mode::kTable ? kMode : Mode::kRaw>;
    else step.run = !conv.pointwise ? run_dense<Core, kMode> : conv.sixes ? Core::template sixes<kMode>() : run_pointwise<Core, kMode>;
}

// How units of packed input are cut, and the weights for it.
template <typename Core> bool prepare_packed(Step& step, Conv& conv, Store& store) {
    const View &in = step.in[0], &out = step.out[0];
    const bool second = step.in[2].c > 0;
    const int deep = in.c / step.group, kh = step.kernel[0], kw = step.kernel[1];
    size_t packed = 0, outputs = 0;  // bytes of packed input, pixels of a unit
    if (conv.depthwise) {
        conv.slice = min((in.c + 15) / 16 * 16, 64);
        conv.slices = (in.c + conv.slice - 1) / conv.slice;
    }
    if (conv.pointwise) {
        conv.second = second ? (in.c + 15) / 16 * 16 : 0;
        const int k = second ? conv.second + step.in[2].c : in.c;
        conv.depth = (k + 15) / 16 * 16;
        conv.segment_bytes = k;
        conv.chunk = max(12, min(96, kScratchBytes / conv.depth / 24 * 24));
        const int chunks = (out.pixels() + conv.chunk - 1) / conv.chunk;
        conv.splits = chunks >= 8 ? 1 : min(4, conv.blocks);
        step.units = chunks * conv.splits;
        packed = static_cast<size_t>(conv.chunk) * conv.depth, outputs = conv.chunk;
    } else {
        const int pixel = conv.depthwise ? conv.slice : in.c;
        const bool whole = step.group == 1 && step.dilation[1] == 1;  // a kernel's row is contiguous
        conv.segments = whole ? kh : kh * kw;
        conv.segment_bytes = whole ? kw * deep : deep;
        // what windows reach, at least the padded row
        const int reach = max((out.w - 1) * step.stride[1] + (kw - 1) * step.dilation[1] + 1, step.pad[1] + in.w);
        conv.row_bytes = reach * pixel;
        conv.chunk = max(1, min(out.h, kScratchBytes / max(1, conv.row_bytes * step.stride[0])));
        if (conv.chunk < out.h && conv.chunk > 1) conv.chunk &= ~1;
        conv.rows_in = (conv.chunk - 1) * step.stride[0] + (kh - 1) * step.dilation[0] + 1;
        step.units = out.n * ((out.h + conv.chunk - 1) / conv.chunk) * conv.slices;
        packed = static_cast<size_t>(conv.rows_in + (conv.depthwise ? 1 : 0)) * conv.row_bytes;
        outputs = static_cast<size_t>(conv.chunk) * out.w;
        ptrdiff_t* offsets = store.array<ptrdiff_t>(static_cast<size_t>(kh * kw + 3));  // depthwise: by fours, the last ones have weight 0
        for (int y = 0; y < kh; y++)
            for (int x = 0; x < (whole && !conv.depthwise ? 1 : kw); x++)
                offsets[y * (whole && !conv.depthwise ? 1 : kw) + x] =
                    static_cast<ptrdiff_t>(y) * step.dilation[0] * conv.row_bytes + x * step.dilation[1] * pixel;
        conv.offsets = offsets;
    }
    conv.raw_at = (packed + 64 + 63) / 64 * 64;
    conv.codes_at = conv.raw_at + (outputs + 16) * kLanes * sizeof(int16_t);
    step.scratch = conv.codes_at + (conv.residual ? (outputs + 16) * kLanes : 0);
    if (!Core::weights(step, conv, store, second ? in.c : 0)) return false;
    if (conv.segments > 1 && !conv.depthwise) {
        ptrdiff_t* jumps = reinterpret_cast<ptrdiff_t*>(store.bytes(sizeof(ptrdiff_t) * conv.segments));
        for (int i = 0; i + 1 < conv.segments; i++) jumps[i] = conv.offsets[i + 1] - conv.offsets[i] - Core::read(conv.groups);
        conv.jumps = jumps;
    }
    return true;
}

// false: codes are not those of a factor, or results may leave int16.
inline bool find_factor(const Step& step, int32_t bias, const Weighed& weights, float m, int zero, int32_t& factor) {
    const int64_t up = (static_cast<int64_t>(weights.magnitude) + weights.sum) / 2, down = weights.magnitude - up;
    const int64_t low = step.in[0].zero, high = 255 - low;  // what a weight is multiplied by, at most
    const int64_t least = bias - up * low - down * high, most = bias + up * high + down * low;
    if (!(m >= 0 && m < 1) || least < INT32_MIN || most > INT32_MAX) return false;
    if (!(static_cast<float>(least) * m > -32000.0f && static_cast<float>(most) * m < 32000.0f)) return false;
    factor = static_cast<int32_t>(__builtin_rintf(m * 2147483648.0f));
    return m == 0 || same_steps(m, factor, zero, static_cast<int32_t>(least), static_cast<int32_t>(most));
}

template <typename Core> bool prepare_conv(Step& step, Store& store) {
    const View &in = step.in[0], &out = step.out[0];
    if (in.dtype != Dtype::kU8) return false;
    const bool second = step.in[2].c > 0;
    const int deep = in.c / step.group, per_group = out.c / step.group;
    const int kh = step.kernel[0], kw = step.kernel[1];
    const bool padded = step.pad[0] || step.pad[1] || step.pad[2] || step.pad[3];
    Conv& conv = conv_of(store);
    conv.residual = step.in[1].c > 0;
    conv.mode = out.dtype == Dtype::kF32 ? Mode::kFloats
                : step.act == Act::kTable   ? Mode::kTable
                : step.act == Act::kCurve   ? Mode::kCurve
                                            : Mode::kCodes;
    conv.depthwise = step.group == in.c && step.group == out.c && step.group > 1 && conv.mode != Mode::kFloats;
    conv.pointwise = kh == 1 && kw == 1 && step.group == 1 && !padded;
    conv.sixes = conv.pointwise && Core::kSixes && out.pixels() > 2;
    if (second && !conv.pointwise) return false;
    conv.blocks = (per_group + kLanes - 1) / kLanes;
    if (!prepare_tables(step, conv, store)) return false;

    const int slots = conv.depthwise ? (out.c + 15) / 16 * 16 : step.group * conv.blocks * kLanes;
    const int each = deep * kh * kw + (second ? step.in[2].c : 0);
    const int8_t* weights = reinterpret_cast<const int8_t*>(step.constants[0]);
    int32_t* bias = reinterpret_cast<int32_t*>(store.bytes(sizeof(int32_t) * slots));
    float* multipliers = reinterpret_cast<float*>(store.bytes(sizeof(float) * slots));
    int32_t* factors = reinterpret_cast<int32_t*>(store.bytes(sizeof(int32_t) * slots));
    bool whole = conv.mode == Mode::kCodes || conv.mode == Mode::kTable;
    for (int o = 0; o < out.c; o++) {
        const int slot = conv.depthwise ? o : (o / per_group * conv.blocks) * kLanes + o % per_group;
        const Weighed weighed(weights + static_cast<size_t>(o) * each, each);
        const int32_t given = reinterpret_cast<const int32_t*>(step.constants[1])[o];
        bias[slot] = full_bias<Core>(step, given, weighed);
        std::memcpy(&multipliers[slot], step.constants[2] + 4 * static_cast<size_t>(o), 4);
        whole = whole && find_factor(step, given, weighed, multipliers[slot], conv.zero, factors[slot]);
    }
    conv.bias = bias;
    conv.multipliers = multipliers;
    conv.factors = factors;
    if (conv.depthwise && conv.residual) conv.mode = Mode::kRaw;
    conv.three = conv.depthwise && Core::three(step);
    if (!whole && (conv.mode == Mode::kCodes || conv.mode == Mode::kTable)) conv.mode = Mode::kRaw;
    step.work = static_cast<uint64_t>(out.pixels()) * out.c * each;

    step.prepared = &conv;
    if (conv.three) Core::prepare_three(step, conv, store);
    else if (!prepare_packed<Core>(step, conv, store)) return false;
    switch (conv.mode) {
        case Mode::kFloats: choose_run<Core, Mode::kFloats>(step, conv); break;
        case Mode::kRaw: choose_run<Core, Mode::kRaw>(step, conv); break;
        case Mode::kTable: choose_run<Core, Mode::kTable>(step, conv); break;
        case Mode::kCurve: choose_run<Core, Mode::kCurve>(step, conv); break;
        case Mode::kCodes: choose_run<Core, Mode::kCodes>(step, conv); break;
    }
    return true;
}

// The k-th weight byte of a window for output channel o of a group, as tiles read it: segments, each padded with zeros.
// `first`: channels of the first input where there are two.
inline int8_t weight_at(const Step& step, const Conv& conv, int o, int segment, int k, int first) {
    if (k >= conv.segment_bytes) return 0;
    const int8_t* all = reinterpret_cast<const int8_t*>(step.constants[0]);
    if (conv.second) {
        const int each = first + conv.segment_bytes - conv.second;
        if (k >= conv.second) return all[static_cast<size_t>(o) * each + first + k - conv.second];
        return k < first ? all[static_cast<size_t>(o) * each + k] : int8_t{0};
    }
    const size_t each = static_cast<size_t>(conv.segments) * conv.segment_bytes;
    return all[o * each + static_cast<size_t>(segment) * conv.segment_bytes + k];
}

}  // namespace
}  // namespace edgekit
