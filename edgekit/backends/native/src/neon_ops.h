// Everything but convolutions of codes for aarch64: addition, products, tables, pools, resizing, dequantization. One unit is a line of
// a picture. Included by one file per instruction set, after its `#pragma GCC target`: all names are that file's own.
#pragma once

#include <arm_neon.h>

#include "neon_floats.h"

namespace edgekit {
namespace {

// What prepare_other() works out: tables by fixed places, so that kernels need not know which operator they serve.
struct Other {
    const uint8_t* table;  // applied to the result, or null
    const struct Window* windows;  // gather: a block's follow each other
    const int* counts;             // gather: how many each block of 16 channels has
};

// A line of pixels as `count` runs of `c` bytes: one run where pixels are packed in all views.
struct Runs {
    int count, c;
};

EK_INLINE Runs runs_of(const View& out, bool packed) { return packed ? Runs{1, out.w * out.c} : Runs{out.w, out.c}; }

EK_INLINE ptrdiff_t line_start(const View& v, int line) { return static_cast<ptrdiff_t>(line) * v.w * v.pitch; }

template <bool kTable, typename Function>
EK_INLINE void binary_lines(const Step& step, const Frame& frame, int begin, int end, const uint8_t* table, Function function) {
    const View &a = step.in[0], &b = step.in[1], &out = step.out[0];
    const Runs runs = runs_of(out, a.pitch == out.c && b.pitch == out.c && out.pitch == out.c);
    for (int line = begin; line < end; line++) {
        const uint8_t *pa = frame.bytes(a) + line_start(a, line), *pb = frame.bytes(b) + line_start(b, line);
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int r = 0; r < runs.count; r++, pa += a.pitch, pb += b.pitch, to += out.pitch)
            for (int i = 0; i < runs.c; i += 16) {
                uint8x16_t q = function(vld1q_u8(pa + i), vld1q_u8(pb + i));
                if constexpr (kTable) q = look_up(table, q);
                store_some(to + i, q, runs.c - i);
            }
    }
}

// The operator on every pair of codes, and the table.
template <typename Function>
EK_INLINE void binary(const Step& step, const Frame& frame, int begin, int end, Function function) {
    const uint8_t* table = static_cast<const Other*>(step.prepared)->table;
    if (table) binary_lines<true>(step, frame, begin, end, table, function);
    else binary_lines<false>(step, frame, begin, end, table, function);
}

void run_add(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    with_sum(step.in[0].zero, step.in[1].zero, step.scalars[0], step.scalars[1], step.out[0].zero,
             [&](auto sum) { binary(step, frame, begin, end, sum); });
}

// sat8u(rne(float((a - za) * (b - zb)) * scale) + zero): the product of two such floats is exact
template <typename Rounding> struct Product {
    Centered a_codes, b_codes;
    float32x4_t scale;
    Rounding rounding;
    EK_INLINE uint8x16_t operator()(uint8x16_t a, uint8x16_t b) const {
        Reals x = a_codes(a);
        const Reals y = b_codes(b);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) x.v[i] = vmulq_f32(vmulq_f32(x.v[i], y.v[i]), scale);
        return rounding(x);
    }
};

// b has one pixel a picture
template <typename Function>
EK_INLINE void by_one_pixel(const Step& step, const Frame& frame, int begin, int end, Function product) {
    const View &a = step.in[0], &b = step.in[1], &out = step.out[0];
    const uint8_t* table = static_cast<const Other*>(step.prepared)->table;
    for (int line = begin; line < end; line++) {
        const uint8_t *pa = frame.bytes(a) + line_start(a, line), *pb = frame.bytes(b) + line / out.h * b.pitch;
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int x = 0; x < out.w; x++, pa += a.pitch, to += out.pitch)
            for (int i = 0; i < out.c; i += 16) {
                uint8x16_t q = product(vld1q_u8(pa + i), vld1q_u8(pb + i));
                if (table) q = look_up(table, q);
                store_some(to + i, q, out.c - i);
            }
    }
}

void run_mul(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &b = step.in[1], &out = step.out[0];
    const float scale = step.scalars[0];
    with_rounding(out.zero, 65025.0f * __builtin_fabsf(scale), [&](auto rounding) {
        const Product<decltype(rounding)> product{Centered(a.zero), Centered(b.zero), vdupq_n_f32(scale), rounding};
        if (b.h == out.h && b.w == out.w) binary(step, frame, begin, end, product);
        else by_one_pixel(step, frame, begin, end, product);
    });
}

void run_table(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const Runs runs = runs_of(out, a.pitch == out.c && out.pitch == out.c);
    const uint8_t* table = static_cast<const Other*>(step.prepared)->table;
    for (int line = begin; line < end; line++) {
        const uint8_t* from = frame.bytes(a) + line_start(a, line);
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int r = 0; r < runs.count; r++, from += a.pitch, to += out.pitch)
            for (int i = 0; i < runs.c; i += 64) {
                uint8x16_t q[4];
                for (int k = 0; k < 4; k++) q[k] = vld1q_u8(from + min(i + 16 * k, runs.c - 1));
                look_up(table, q);
                for (int k = 0; k < 4 && i + 16 * k < runs.c; k++) store_some(to + i + 16 * k, q[k], runs.c - i - 16 * k);
            }
    }
}

void run_nearest(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const int32_t* rows = reinterpret_cast<const int32_t*>(step.constants[0]);
    const int32_t* columns = reinterpret_cast<const int32_t*>(step.constants[1]);
    const uint8_t* table = static_cast<const Other*>(step.prepared)->table;
    for (int line = begin; line < end; line++) {
        const int source = line / out.h * a.h + rows[line % out.h];
        const uint8_t* from = frame.bytes(a) + line_start(a, source);
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        if (table) {
            for (int x = 0; x < out.w; x++, to += out.pitch)
                for (int i = 0; i < out.c; i += 16) store_some(to + i, look_up(table, vld1q_u8(from + columns[x] * a.pitch + i)), out.c - i);
        } else {
            for (int x = 0; x < out.w; x++, to += out.pitch)
                for (int i = 0; i < out.c; i += 16) store_some(to + i, vld1q_u8(from + columns[x] * a.pitch + i), out.c - i);
        }
    }
}

// The largest of `count` vectors, `step` bytes apart.
EK_INLINE uint8x16_t largest(const uint8_t* from, ptrdiff_t step, int count) {
    uint8x16_t q = vdupq_n_u8(0);
    for (; count > 0; count--, from += step) q = vmaxq_u8(q, vld1q_u8(from));
    return q;
}

// A line of outputs: the window's rows first, into scratch, then its columns.
void run_max_pool(const Step& step, const Frame& frame, int begin, int end, uint8_t* scratch) {
    const View &a = step.in[0], &out = step.out[0];
    const uint8_t* table = static_cast<const Other*>(step.prepared)->table;
    const int wide = (a.c + 15) / 16 * 16;
    for (int line = begin; line < end; line++) {
        const Inside rows = inside(line % out.h * step.stride[0] - step.pad[0], step.kernel[0], step.dilation[0], a.h);
        const uint8_t* from = frame.bytes(a) + line_start(a, line / out.h * a.h + rows.first);
        const ptrdiff_t down = line_start(a, step.dilation[0]);
        for (int x = 0; x < a.w; x++, from += a.pitch)
            for (int i = 0; i < a.c; i += 16) vst1q_u8(scratch + x * wide + i, largest(from + i, down, rows.count));
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int x = 0; x < out.w; x++, to += out.pitch) {
            const Inside columns = inside(x * step.stride[1] - step.pad[1], step.kernel[1], step.dilation[1], a.w);
            for (int i = 0; i < a.c; i += 16) {
                uint8x16_t q = largest(scratch + columns.first * wide + i, step.dilation[1] * wide, columns.count);
                if (table) q = look_up(table, q);
                store_some(to + i, q, a.c - i);
            }
        }
    }
}

// Sums of windows, 16 channels at a time.
void run_avg_pool(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const int16x8_t zero = vdupq_n_s16(static_cast<int16_t>(out.zero));
    for (int line = begin; line < end; line++) {
        const int picture = line / out.h, top = line % out.h * step.stride[0] - step.pad[0];
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int x = 0; x < out.w; x++, to += out.pitch) {
            const int left = x * step.stride[1] - step.pad[1];
            for (int i = 0; i < a.c; i += 16) {
                uint32x4_t sums[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
                int count = 0;
                for (int ky = 0; ky < step.kernel[0]; ky++) {
                    const int y = top + ky * step.dilation[0];
                    if (y < 0 || y >= a.h) continue;
                    const uint8_t* from = frame.bytes(a) + line_start(a, picture * a.h + y) + i;
                    for (int kx = 0; kx < step.kernel[1]; kx++) {
                        const int column = left + kx * step.dilation[1];
                        if (column < 0 || column >= a.w) continue;
                        const uint8x16_t v = vld1q_u8(from + column * a.pitch);
                        const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_high_u8(v);
                        sums[0] = vaddw_u16(sums[0], vget_low_u16(low)), sums[1] = vaddw_high_u16(sums[1], low);
                        sums[2] = vaddw_u16(sums[2], vget_low_u16(high)), sums[3] = vaddw_high_u16(sums[3], high);
                        count++;
                    }
                }
                const int divisor = step.ints[0] == 1 ? step.kernel[0] * step.kernel[1] : count;
                const float32x4_t scale = vdupq_n_f32(step.scalars[0] / static_cast<float>(divisor));
                const int32x4_t shift = vdupq_n_s32(-count * a.zero);
                int32x4_t r[4];
                for (int k = 0; k < 4; k++)
                    r[k] = vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(vaddq_s32(vreinterpretq_s32_u32(sums[k]), shift)), scale));
                const int16x8_t low = narrow(r[0], r[1]), high = narrow(r[2], r[3]);
                store_some(to + i, pack_codes(vqaddq_s16(low, zero), vqaddq_s16(high, zero)), a.c - i);
            }
        }
    }
}

void run_dequantize(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const float* values = reinterpret_cast<const float*>(step.constants[0]);
    const Runs runs = runs_of(out, a.pitch == out.c && out.pitch == out.c);
    for (int line = begin; line < end; line++) {
        const uint8_t* from = frame.bytes(a) + line_start(a, line);
        float* to = frame.floats(out) + line_start(out, line);
        for (int r = 0; r < runs.count; r++, from += a.pitch, to += out.pitch)
            for (int i = 0; i < runs.c; i++) to[i] = values[from[i]];
    }
}

void run_quantize(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    quantize<Vec128>(step.scalars[0], out.zero, frame.floats(a) + line_start(a, begin), a.pitch, frame.bytes(out) + line_start(out, begin),
                     out.pitch, (end - begin) * out.w, out.c);
}

// r = between four codes; sat8u(rne(r * scale) + zero)
void run_bilinear(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const int32_t* rows = reinterpret_cast<const int32_t*>(step.constants[0]);
    const int32_t* columns = reinterpret_cast<const int32_t*>(step.constants[2]);
    const float* down = reinterpret_cast<const float*>(step.constants[1]);
    const float* across = reinterpret_cast<const float*>(step.constants[3]);
    const Centered real(a.zero);
    const Rounded<Round::kAny> code(out.zero);
    const float32x4_t scale = vdupq_n_f32(step.scalars[0]);
    const auto between = [](const Reals& p, const Reals& q, float32x4_t by) __attribute__((always_inline)) {
        Reals r;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) r.v[i] = vaddq_f32(p.v[i], vmulq_f32(vsubq_f32(q.v[i], p.v[i]), by));
        return r;
    };
    for (int line = begin; line < end; line++) {
        const int y = line % out.h, picture = line / out.h * a.h;
        const uint8_t *upper = frame.bytes(a) + line_start(a, picture + rows[2 * y]), *lower = frame.bytes(a) + line_start(a, picture + rows[2 * y + 1]);
        const float32x4_t wy = vdupq_n_f32(down[y]);
        uint8_t* to = frame.bytes(out) + line_start(out, line);
        for (int x = 0; x < out.w; x++, to += out.pitch) {
            const ptrdiff_t left = columns[2 * x] * a.pitch, right = columns[2 * x + 1] * a.pitch;
            const float32x4_t wx = vdupq_n_f32(across[x]);
            for (int i = 0; i < out.c; i += 16) {
                const Reals top = between(real(vld1q_u8(upper + left + i)), real(vld1q_u8(upper + right + i)), wx);
                Reals r = between(top, between(real(vld1q_u8(lower + left + i)), real(vld1q_u8(lower + right + i)), wx), wy);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) r.v[k] = vmulq_f32(r.v[k], scale);
                store_some(to + i, code(r), out.c - i);
            }
        }
    }
}

// 32 channels of the input, and which of them go to each of 16 outputs; 255: none.
struct Window {
    uint8_t pick[16];
    int first;
    int reserved[3];
};

// A block of 16 outputs goes through a line before the next one does: what picks stays in registers.
void run_gather(const Step& step, const Frame& frame, int begin, int end, uint8_t*) {
    const View &a = step.in[0], &out = step.out[0];
    const Other& other = *static_cast<const Other*>(step.prepared);
    const uint8_t* table = other.table;
    for (int line = begin; line < end; line++) {
        const Window* window = other.windows;
        for (int i = 0; i < out.c; i += 16) {
            const uint8_t* from = frame.bytes(a) + line_start(a, line);
            uint8_t* to = frame.bytes(out) + line_start(out, line) + i;
            const int count = other.counts[i / 16];
            for (int x = 0; x < out.w; x++, from += a.pitch, to += out.pitch) {
                uint8x16_t q = vdupq_n_u8(0);
                for (int k = 0; k < count; k++) {
                    const uint8_t* at = from + window[k].first;
                    q = vqtbx2q_u8(q, uint8x16x2_t{{vld1q_u8(at), vld1q_u8(at + 16)}}, vld1q_u8(window[k].pick));
                }
                if (table) q = look_up(table, q);
                store_some(to, q, out.c - i);
            }
            window += count;
        }
    }
}

// Windows begin at the lowest channel that none before holds.
void prepare_gather(const Step& step, Other& other, Store& store) {
    const int32_t* indices = reinterpret_cast<const int32_t*>(step.constants[0]);
    const int c = step.out[0].c;
    Window* window = store.array<Window>(static_cast<size_t>(c));
    int* counts = store.array<int>(static_cast<size_t>((c + 15) / 16));
    other.windows = window, other.counts = counts;
    for (int i = 0; i < c; i += 16) {
        const int wide = min(16, c - i);
        for (int after = -1;; window++, counts[i / 16]++) {  // channels up to `after` have been picked
            int first = INT32_MAX;
            for (int k = i; k < i + wide; k++)
                if (indices[k] > after) first = min(first, indices[k]);
            if (first == INT32_MAX) break;
            window->first = first, after = first + 31;
            for (int k = 0; k < 16; k++) {
                const int at = k < wide ? indices[i + k] - first : -1;
                window->pick[k] = static_cast<uint8_t>(at >= 0 && at < 32 ? at : 255);
            }
        }
    }
}

bool prepare_other(Step& step, Store& store) {
    const bool codes = step.in[0].dtype == Dtype::kU8 && step.out[0].dtype == Dtype::kU8;
    int table = 0;  // which constant
    switch (step.type) {
        case OpType::kAdd: step.run = run_add; break;
        case OpType::kMul: step.run = run_mul; break;
        case OpType::kTable: step.run = run_table; break;
        case OpType::kMaxPool: step.run = run_max_pool; break;
        case OpType::kAvgPool: step.run = run_avg_pool; break;
        case OpType::kNearest: step.run = run_nearest, table = 2; break;
        case OpType::kGather: step.run = run_gather, table = 1; break;
        case OpType::kBilinear: step.run = run_bilinear; break;
        case OpType::kQuantize: step.run = run_quantize; break;
        case OpType::kDequantize: step.run = run_dequantize; break;
        default: return prepare_floats<Vec128>(step, store);
    }
    if (!codes && step.type != OpType::kQuantize && step.type != OpType::kDequantize) return false;
    Other* other = reinterpret_cast<Other*>(store.bytes(sizeof(Other)));
    other->table = step.type == OpType::kBilinear ? nullptr : step.constants[table];
    if (step.type == OpType::kGather) prepare_gather(step, *other, store);
    step.prepared = other;
    return by_rows(step, window_size(step), step.type == OpType::kMaxPool ? static_cast<size_t>(step.in[0].w) * ((step.in[0].c + 15) / 16 * 16) + 64 : 0);
}

}  // namespace
}  // namespace edgekit
