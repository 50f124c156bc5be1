// What is believed of a payload: nothing that is not checked here. What passes is safe to prepare and to run: every
// address that an operator can form lies in its tensor, every index constant in its range, every sum in int32.
#pragma GCC optimize("Os")  // nothing here is on the way of a run

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "payloads are little-endian and used where they lie"
#endif

namespace edgekit {
namespace {

constexpr uint32_t kMost = 16384;          // buffers, tensors, ops, ports
constexpr uint64_t kMostElements = 1u << 30;  // of a buffer
constexpr uint32_t kMostSize = 1u << 24;   // of an axis
constexpr uint32_t kMostKernel = 4096;     // kernel, stride, dilation
constexpr double kMostReal = 1073741824.0;  // 2^30: what rne is given stays below

struct Shape {
    int least, most;  // inputs
    int bytes;        // which inputs are u8: 1 all, 0 none
    int out;          // output: 1 u8, 0 f32, -1 like the first input, -2 either
};

const Shape* shape_of(OpType type) {
    static const Shape conv{1, 3, 1, -2}, two{2, 2, 1, 1}, one{1, 1, 1, 1}, either{1, 1, -1, -1}, quantize{1, 1, 0, 1},
        dequantize{1, 1, 1, 0}, conv_f32{1, 1, 0, -2}, one_f32{1, 1, 0, 0}, two_f32{2, 2, 0, 0};
    switch (type) {
        case OpType::kConv: return &conv;
        case OpType::kAdd: case OpType::kMul: return &two;
        case OpType::kTable: case OpType::kMaxPool: case OpType::kAvgPool: return &one;
        case OpType::kNearest: case OpType::kBilinear: case OpType::kGather: return &either;
        case OpType::kQuantize: return &quantize;
        case OpType::kDequantize: return &dequantize;
        case OpType::kConvF32: return &conv_f32;
        case OpType::kUnaryF32: case OpType::kMaxPoolF32: case OpType::kAvgPoolF32:
        case OpType::kSoftmaxF32: case OpType::kCopyF32: return &one_f32;
        case OpType::kAddF32: case OpType::kMulF32: return &two_f32;
    }
    return nullptr;
}

bool text(const uint8_t* bytes, size_t count) {  // UTF-8 without control characters
    for (size_t i = 0; i < count;) {
        const uint8_t first = bytes[i++];
        if (first < 0x20 || first == 0x7f) return false;
        if (first < 0x80) continue;
        const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
        if (first < 0xc2 || first > 0xf4 || count - i < static_cast<size_t>(more)) return false;
        uint32_t point = first & (0x3f >> more);
        for (int k = 0; k < more; ++k, ++i) {
            if ((bytes[i] & 0xc0) != 0x80) return false;
            point = point << 6 | (bytes[i] & 0x3f);
        }
        static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
        if (point < least[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return false;
    }
    return true;
}

bool same_pixels(const View& a, const View& b) { return a.n == b.n && a.h == b.h && a.w == b.w; }
bool same_shape(const View& a, const View& b) { return same_pixels(a, b) && a.c == b.c; }

// Whether elements of the two can be the same ones.
bool overlap(const View& a, const View& b) {
    if (a.buffer != b.buffer) return false;
    if (a.pitch != b.pitch) return true;  // not worth the arithmetic: one of them has another shape
    const ptrdiff_t a0 = a.offset % a.pitch, b0 = b.offset % b.pitch, a1 = a.offset / a.pitch, b1 = b.offset / b.pitch;
    return a0 < b0 + b.c && b0 < a0 + a.c && a1 < b1 + b.pixels() && b1 < a1 + a.pixels();
}

// Sum of |weights|. O3 for the loop: most of the time that a check takes.
__attribute__((optimize("O3"))) int64_t magnitude(const int8_t* weights, uint64_t count) {
    int64_t total = 0;
    for (uint64_t at = 0; at < count;) {  // in blocks that fit int32
        int32_t block = 0;
        for (const uint64_t end = std::min(count, at + (1u << 20)); at < end; ++at) block += std::abs(weights[at]);
        total += block;
    }
    return total;
}

class Checker {
  public:
    Checker(const void* data, size_t bytes) : data_(static_cast<const uint8_t*>(data)), bytes_(bytes) {}

    Network all() {
        header();
        buffers();
        tensors();
        ports();
        ops();
        flow();
        return std::move(net_);
    }

  private:
    // --- the file ---

    template <typename T> const T* section(const char* what, uint64_t at, uint64_t count) {
        if (at % 64 || at < sizeof(Header) || at > bytes_ || count > (bytes_ - at) / sizeof(T))
            fail(EK_BAD_FILE, "payload: %s: %llu of %zu bytes at %llu do not fit a file of %zu bytes", what,
                 static_cast<unsigned long long>(count), sizeof(T), static_cast<unsigned long long>(at), bytes_);
        return reinterpret_cast<const T*>(data_ + at);
    }

    void header() {
        if (reinterpret_cast<uintptr_t>(data_) % 64) fail(EK_BAD_ARGUMENT, "payload: memory is not aligned to 64 bytes");
        if (bytes_ < sizeof(Header) || std::memcmp(data_, kMagic, sizeof(kMagic)))
            fail(EK_BAD_FILE, "payload: not of the native engine");
        header_ = reinterpret_cast<const Header*>(data_);
        if (header_->version != kVersion)
            fail(EK_UNSUPPORTED, "payload: version %u, expected %u", header_->version, kVersion);
        if (header_->file_bytes != bytes_)
            fail(EK_BAD_FILE, "payload: has %zu bytes, expected %llu", bytes_,
                 static_cast<unsigned long long>(header_->file_bytes));
        for (uint32_t count : {header_->buffers, header_->tensors, header_->ops, header_->ports})
            if (count > kMost) fail(EK_BAD_FILE, "payload: %u entries, at most %u", count, kMost);
        if (header_->reserved) fail(EK_BAD_FILE, "payload: reserved bits are set");
        raw_buffers_ = section<Buffer>("buffers", header_->buffers_at, header_->buffers);
        raw_tensors_ = section<Tensor>("tensors", header_->tensors_at, header_->tensors);
        raw_ops_ = section<Op>("operators", header_->ops_at, header_->ops);
        raw_ports_ = section<Port>("ports", header_->ports_at, header_->ports);
        constants_ = section<uint8_t>("constants", header_->constants_at, header_->constants_bytes);
    }

    void buffers() {
        net_.buffers.resize(header_->buffers);
        for (uint32_t i = 0; i < header_->buffers; ++i) {
            const Buffer& raw = raw_buffers_[i];
            if (!raw.bytes || raw.bytes > 4 * kMostElements || raw.external > 1 || raw.reserved)
                fail(EK_BAD_FILE, "payload: buffer %u: %llu bytes, external %u", i,
                     static_cast<unsigned long long>(raw.bytes), raw.external);
            net_.buffers[i].bytes = raw.bytes;
            net_.buffers[i].external = raw.external;
        }
    }

    void tensors() {
        net_.tensors.resize(header_->tensors);
        std::vector<uint32_t> kind(header_->buffers, kNone);
        for (uint32_t i = 0; i < header_->tensors; ++i) {
            const Tensor& raw = raw_tensors_[i];
            const bool sound = raw.buffer < header_->buffers && raw.dtype <= 1 && !raw.reserved[0] && !raw.reserved[1];
            if (!sound) fail(EK_BAD_FILE, "payload: tensor %u: buffer %u, type %u", i, raw.buffer, raw.dtype);
            uint64_t pixels = 1;
            for (int axis = 0; axis < 4; ++axis) {
                if (!raw.shape[axis] || raw.shape[axis] > kMostSize)
                    fail(EK_BAD_FILE, "payload: tensor %u: an axis of %u", i, raw.shape[axis]);
                if (axis < 3) pixels *= raw.shape[axis];
                if (pixels > kMostElements) fail(EK_BAD_FILE, "payload: tensor %u: too large", i);
            }
            const uint64_t size = raw.dtype ? 4 : 1, room = net_.buffers[raw.buffer].bytes / size, c = raw.shape[3];
            // what is subtracted was compared before: nothing wraps
            if (!raw.pitch || raw.pitch > kMostElements || raw.offset > room || c > raw.pitch ||
                raw.offset % raw.pitch > raw.pitch - c || c > room - raw.offset ||
                (pixels - 1) > (room - raw.offset - c) / raw.pitch || pixels * raw.pitch > 2 * kMostElements)
                fail(EK_BAD_FILE, "payload: tensor %u: does not fit its buffer of %zu bytes", i,
                     net_.buffers[raw.buffer].bytes);
            if (kind[raw.buffer] != kNone && kind[raw.buffer] != raw.dtype)
                fail(EK_BAD_FILE, "payload: tensor %u: its buffer holds another type", i);
            kind[raw.buffer] = raw.dtype;
            if (!raw.dtype && !(raw.scale > 0 && std::isfinite(raw.scale) && raw.zero >= 0 && raw.zero <= 255))
                fail(EK_BAD_FILE, "payload: tensor %u: scale %g, zero point %d", i, raw.scale, raw.zero);
            View& v = net_.tensors[i];
            v.buffer = raw.buffer;
            v.dtype = static_cast<Dtype>(raw.dtype);
            v.n = static_cast<int>(raw.shape[0]);
            v.h = static_cast<int>(raw.shape[1]);
            v.w = static_cast<int>(raw.shape[2]);
            v.c = static_cast<int>(raw.shape[3]);
            v.offset = static_cast<ptrdiff_t>(raw.offset);
            v.pitch = static_cast<ptrdiff_t>(raw.pitch);
            v.scale = raw.dtype ? 1.0f : raw.scale;
            v.zero = raw.dtype ? 0 : raw.zero;
        }
    }

    void ports() {
        net_.ports.resize(header_->ports);
        port_of_.assign(header_->buffers, -1);
        for (uint32_t i = 0; i < header_->ports; ++i) port(i);
        for (uint32_t i = 0; i < header_->ports; ++i) {
            const Port& raw = raw_ports_[i];
            if (raw.state == kNone) continue;
            if (raw.output || raw.state >= header_->ports || !raw_ports_[raw.state].output)
                fail(EK_BAD_FILE, "payload: port %s: its next value is no output", raw.name);
            const View &now = net_.ports[i].view, &next = net_.ports[raw.state].view;
            if (!same_shape(now, next) || now.dtype != next.dtype || now.scale != next.scale || now.zero != next.zero)
                fail(EK_BAD_FILE, "payload: port %s: its next value has another type or shape", raw.name);
            for (uint32_t k = 0; k < i; ++k)
                if (raw_ports_[k].state == raw.state)
                    fail(EK_BAD_FILE, "payload: port %s: its next value is that of another state", raw.name);
            net_.ports[i].next = static_cast<int>(raw.state);
        }
        for (uint32_t i = 0; i < header_->buffers; ++i)
            if (net_.buffers[i].external && port_of_[i] < 0) fail(EK_BAD_FILE, "payload: buffer %u: of no port", i);
    }

    void port(uint32_t i) {
        const Port& raw = raw_ports_[i];
        const size_t letters = strnlen(raw.name, sizeof(raw.name));
        if (!letters || letters == sizeof(raw.name) || !text(reinterpret_cast<const uint8_t*>(raw.name), letters))
            fail(EK_BAD_FILE, "payload: port %u: its name is no text", i);
        if (raw.tensor >= header_->tensors || raw.output > 1 || raw.rank > 8 || raw.channels_last > 1 || raw.reserved)
            fail(EK_BAD_FILE, "payload: port %s: tensor %u, rank %u", raw.name, raw.tensor, raw.rank);
        for (uint32_t k = 0; k < i; ++k)
            if (!std::strcmp(raw_ports_[k].name, raw.name) && raw_ports_[k].output == raw.output)
                fail(EK_BAD_FILE, "payload: port %s: twice", raw.name);
        const View& v = net_.tensors[raw.tensor];
        const BufferPlan& buffer = net_.buffers[v.buffer];
        const uint64_t elements = static_cast<uint64_t>(v.pixels()) * v.c;
        uint64_t seen = 1;
        for (uint32_t axis = 0; axis < raw.rank; ++axis) {
            if (!raw.shape[axis] || raw.shape[axis] > elements) seen = 0;
            seen = seen > elements ? 0 : seen * raw.shape[axis];
        }
        const bool turned = !raw.channels_last || (raw.rank >= 3 && static_cast<int>(raw.shape[0]) == v.n &&
                                                   static_cast<int>(raw.shape[1]) == v.c);
        if (seen != elements || !turned) fail(EK_BAD_FILE, "payload: port %s: its shape is not that of its tensor", raw.name);
        const size_t bytes = elements * (v.dtype == Dtype::kF32 ? 4 : 1);
        if (!buffer.external || v.offset || v.pitch != v.c || buffer.bytes != bytes || port_of_[v.buffer] >= 0)
            fail(EK_BAD_FILE, "payload: port %s: has no buffer of its own", raw.name);
        port_of_[v.buffer] = static_cast<int>(i);
        net_.ports[i].port = raw;
        net_.ports[i].view = v;
        net_.ports[i].bytes = bytes;
    }

    // --- operators ---

    [[noreturn]] void bad(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        char line[256];
        va_list list;
        va_start(list, format);
        std::vsnprintf(line, sizeof(line), format, list);
        va_end(list);
        fail(EK_BAD_FILE, "payload: operator %zu%s%.*s: %s", net_.steps.size(), step_.name_bytes ? " " : "",
             step_.name_bytes, step_.name, line);
    }

    const uint8_t* range(const Range& r, size_t multiple) {
        if (!r.bytes) return nullptr;
        if (r.at % multiple || r.at > header_->constants_bytes || r.bytes > header_->constants_bytes - r.at)
            bad("%llu bytes of constants at %llu, of %llu", static_cast<unsigned long long>(r.bytes),
                static_cast<unsigned long long>(r.at), static_cast<unsigned long long>(header_->constants_bytes));
        return constants_ + r.at;
    }

    template <typename T> const T* constant(int number, uint64_t count) {
        if (!step_.constants[number] || step_.constant_bytes[number] != count * sizeof(T))
            bad("constant %d has %zu bytes, expected %llu", number, step_.constant_bytes[number],
                static_cast<unsigned long long>(count * sizeof(T)));
        return reinterpret_cast<const T*>(step_.constants[number]);
    }

    void table(int number) {  // optional
        if (step_.constants[number]) constant<uint8_t>(number, 256);
        constants(number + 1);
    }

    void constants(int most) {  // none from here on
        for (int i = most; i < 6; ++i)
            if (step_.constants[i]) bad("constant %d is not known", i);
    }

    void ops() {
        net_.steps.reserve(header_->ops);
        for (uint32_t i = 0; i < header_->ops; ++i) {
            step_ = Step();
            op(raw_ops_[i]);
            for (size_t bytes : step_.constant_bytes) net_.weight_bytes += bytes;
            net_.steps.push_back(step_);
        }
    }

    void op(const Op& raw) {
        Step& s = step_;
        s.type = static_cast<OpType>(raw.type);
        s.act = static_cast<Act>(raw.act);
        const Shape* shape = shape_of(s.type);
        if (!shape) bad("type %u is not known", raw.type);
        const uint8_t* name = range(raw.name, 1);
        if (name && (raw.name.bytes > 4096 || !text(name, raw.name.bytes))) bad("its name is no text");
        if (name) s.name = reinterpret_cast<const char*>(name), s.name_bytes = static_cast<int>(raw.name.bytes);
        for (int i = 0; i < 4; ++i) {
            if (raw.inputs[i] == kNone) continue;
            if (raw.inputs[i] >= header_->tensors) bad("tensor %u is not there", raw.inputs[i]);
            s.in[i] = net_.tensors[raw.inputs[i]];
            s.inputs = i + 1;
            if (shape->bytes >= 0 && (s.in[i].dtype == Dtype::kU8) != (shape->bytes == 1))
                bad("input %d has another type", i);
        }
        if (s.inputs < shape->least || s.inputs > shape->most || !s.in[0].c || (shape->least > 1 && !s.in[1].c))
            bad("%d inputs", s.inputs);
        if (raw.outputs[0] >= header_->tensors || raw.outputs[1] != kNone) bad("expected one output");
        s.out[0] = net_.tensors[raw.outputs[0]];
        s.outputs = 1;
        const Dtype out = s.out[0].dtype;
        if ((shape->out == -1 && out != s.in[0].dtype) || (shape->out >= 0 && (out == Dtype::kU8) != (shape->out == 1)))
            bad("its output has another type");
        for (int i = 0; i < s.inputs; ++i)
            if (s.in[i].c && overlap(s.in[i], s.out[0])) bad("writes what it reads");
        if (port_of_[s.out[0].buffer] >= 0 && !raw_ports_[port_of_[s.out[0].buffer]].output) bad("writes an input");
        for (int i = 0; i < 2; ++i) {
            if (raw.kernel[i] < 1 || raw.kernel[i] > kMostKernel || raw.stride[i] < 1 || raw.stride[i] > kMostKernel ||
                raw.dilation[i] < 1 || raw.dilation[i] > kMostKernel)
                bad("kernel %u, stride %u, dilation %u", raw.kernel[i], raw.stride[i], raw.dilation[i]);
            s.kernel[i] = static_cast<int>(raw.kernel[i]);
            s.stride[i] = static_cast<int>(raw.stride[i]);
            s.dilation[i] = static_cast<int>(raw.dilation[i]);
        }
        for (int i = 0; i < 4; ++i) {
            const int extent = s.dilation[i % 2] * (s.kernel[i % 2] - 1) + 1;
            if (raw.pad[i] >= static_cast<uint32_t>(extent)) bad("pad %u of a window of %d", raw.pad[i], extent);
            s.pad[i] = static_cast<int>(raw.pad[i]);
        }
        if (raw.group < 1 || raw.group > kMostSize) bad("group %u", raw.group);
        s.group = static_cast<int>(raw.group);
        for (int i = 0; i < 5; ++i) s.ints[i] = raw.ints[i];
        for (int i = 0; i < 6; ++i) {
            if (!std::isfinite(raw.scalars[i])) bad("scalar %d is not finite", i);
            s.scalars[i] = raw.scalars[i];
            s.constants[i] = range(raw.constants[i], 64);
            s.constant_bytes[i] = s.constants[i] ? raw.constants[i].bytes : 0;
        }
        details();
    }

    void details() {
        Step& s = step_;
        const bool windows = s.type == OpType::kConv || s.type == OpType::kConvF32 || s.type == OpType::kMaxPool ||
                             s.type == OpType::kAvgPool || s.type == OpType::kMaxPoolF32 || s.type == OpType::kAvgPoolF32;
        if (!windows)
            for (int i = 0; i < 2; ++i)
                if (s.kernel[i] != 1 || s.stride[i] != 1 || s.dilation[i] != 1) bad("has no windows");
        if (s.group != 1 && s.type != OpType::kConv && s.type != OpType::kConvF32) bad("has no groups");
        const bool floats = s.type == OpType::kConvF32 || s.type == OpType::kUnaryF32 ||
                            (s.type == OpType::kConv && s.out[0].dtype == Dtype::kF32);
        const uint32_t act = static_cast<uint32_t>(s.act);
        if (s.act != Act::kNone && (floats ? act < 16 || act > 25 : s.type != OpType::kConv || act > 2))
            bad("activation %u is not known", act);
        switch (s.type) {
            case OpType::kConv: return conv();
            case OpType::kAdd: return add();
            case OpType::kMul: return mul();
            case OpType::kTable:
                if (!same_shape(s.in[0], s.out[0])) bad("shapes differ");
                constant<uint8_t>(0, 256);
                return constants(1);
            case OpType::kMaxPool: window(); pool(); return table(0);
            case OpType::kAvgPool: average(); bounded(255.0 * s.scalars[0]); return constants(0);
            case OpType::kNearest: return nearest();
            case OpType::kBilinear: return bilinear();
            case OpType::kGather: return gather();
            case OpType::kQuantize: same_one(); return constants(0);
            case OpType::kDequantize: same_one(); constant<float>(0, 256); return constants(1);
            case OpType::kConvF32: return conv_f32();
            case OpType::kAddF32:
                if (!same_shape(s.in[0], s.in[1])) bad("shapes differ");
                same_one();
                return constants(0);
            case OpType::kMulF32: factor(); same_one(); return constants(0);
            case OpType::kMaxPoolF32: window(); pool(); return constants(0);
            case OpType::kAvgPoolF32: average(); return constants(0);
            case OpType::kUnaryF32: case OpType::kSoftmaxF32: case OpType::kCopyF32: same_one(); return constants(0);
        }
    }

    void same_one() {
        if (!same_shape(step_.in[0], step_.out[0])) bad("shapes differ");
    }

    void bounded(double most) {
        if (!(std::fabs(most) < kMostReal)) bad("its codes could be as large as %g", most);
    }

    void code(int32_t zero) {
        if (zero < 0 || zero > 255) bad("zero point %d", zero);
    }

    // Sizes of the output from those of the input.
    void window() {
        const Step& s = step_;
        const int in[2] = {s.in[0].h, s.in[0].w}, out[2] = {s.out[0].h, s.out[0].w};
        if (s.in[0].n != s.out[0].n) bad("shapes differ");
        for (int i = 0; i < 2; ++i) {
            const int64_t room = static_cast<int64_t>(in[i]) + s.pad[i] + s.pad[i + 2] - s.dilation[i] * (s.kernel[i] - 1) - 1;
            if (room < 0 || room / s.stride[i] + 1 != out[i])
                bad("%d windows over %d, expected %lld", out[i], in[i], static_cast<long long>(room / s.stride[i] + 1));
        }
    }

    // Every window of a pool has an element inside the picture.
    void pool() {
        const Step& s = step_;
        if (s.in[0].c != s.out[0].c) bad("shapes differ");
        const int in[2] = {s.in[0].h, s.in[0].w}, out[2] = {s.out[0].h, s.out[0].w};
        for (int i = 0; i < 2; ++i)
            for (int64_t o = 0; o < out[i]; ++o) {
                int64_t at = o * s.stride[i] - s.pad[i];
                if (at < 0) at += (-at + s.dilation[i] - 1) / s.dilation[i] * s.dilation[i];
                const int64_t last = o * s.stride[i] - s.pad[i] + s.dilation[i] * (s.kernel[i] - 1);
                if (at >= in[i] || at > last) bad("a window lies outside of the picture");
            }
    }

    void average() {
        const Step& s = step_;
        window();
        pool();
        if (s.ints[0] < 0 || s.ints[0] > 1) bad("counts by %d", s.ints[0]);
        const int64_t rows = std::min(s.kernel[0], s.in[0].h), columns = std::min(s.kernel[1], s.in[0].w);
        if (rows * columns > INT32_MAX / 255) bad("sums leave int32");
    }

    // Channels and groups; returns weights per output channel.
    uint64_t products(int channels) {
        const Step& s = step_;
        if (channels % s.group || s.out[0].c % s.group) bad("%d groups of %d and %d channels", s.group, channels, s.out[0].c);
        return static_cast<uint64_t>(s.kernel[0]) * static_cast<uint64_t>(s.kernel[1]) * static_cast<uint64_t>(channels / s.group);
    }

    // Kernels copy lines of the picture with their pads, as many as a window is high or one is from the next, two bytes a code.
    void padded_lines() {
        const Step& s = step_;
        const auto extent = [&](int i) { return static_cast<uint64_t>(s.dilation[i]) * static_cast<uint64_t>(s.kernel[i] - 1) + 1; };
        const uint64_t reach = static_cast<uint64_t>(s.out[0].w - 1) * static_cast<uint64_t>(s.stride[1]) + extent(1);
        const uint64_t columns = std::max(reach, static_cast<uint64_t>(s.pad[1]) + static_cast<uint64_t>(s.in[0].w));
        const uint64_t rows = std::max(extent(0), static_cast<uint64_t>(s.stride[0]));
        const uint64_t most = kMostElements / 4 / static_cast<uint64_t>(s.in[0].c);
        if (columns > most || columns * rows > most) bad("lines of %d channels with their pads are too large", s.in[0].c);
    }

    void conv() {
        const Step& s = step_;
        window();
        padded_lines();
        int channels = s.in[0].c;
        if (s.ints[2] < 0 || s.ints[2] > 1 || (s.ints[2] == 1) != (s.inputs == 3)) bad("%d inputs", s.inputs);
        if (s.ints[2]) {
            const View& more = s.in[2];
            const bool pointwise = s.kernel[0] == 1 && s.kernel[1] == 1 && s.stride[0] == 1 && s.stride[1] == 1 && s.group == 1;
            if (!pointwise || !same_pixels(more, s.in[0]) || more.scale != s.in[0].scale || more.zero != s.in[0].zero)
                bad("its input cannot go on in another one");
            channels += more.c;
        }
        const uint64_t count = products(channels);
        const int outs = s.out[0].c;
        const int8_t* weights = constant<int8_t>(0, count * static_cast<uint64_t>(outs));
        const int32_t* bias = constant<int32_t>(1, static_cast<uint64_t>(outs));
        const float* scale = constant<float>(2, static_cast<uint64_t>(outs));
        const int64_t far = std::max(s.in[0].zero, 255 - s.in[0].zero);
        for (int o = 0; o < outs; ++o) {
            const int64_t total = std::min(magnitude(weights, count), int64_t{1} << 40);
            weights += count;
            const int64_t most = total * far + std::abs(static_cast<int64_t>(bias[o]));
            if (most > INT32_MAX) bad("sums of channel %d leave int32", o);
            if (!std::isfinite(scale[o])) bad("multiplier of channel %d is not finite", o);
            bounded(static_cast<double>(most) * scale[o]);
        }
        const bool bytes = s.out[0].dtype == Dtype::kU8;
        if (s.act == Act::kTable) constant<uint8_t>(3, 256), code(s.ints[0]);
        if (s.act == Act::kCurve) {
            constant<int16_t>(3, 128);
            if (s.ints[0] < -32768 || s.ints[0] > 32767) bad("curve begins at %d", s.ints[0]);
        }
        if (s.act != Act::kTable && s.act != Act::kCurve && s.constants[3]) bad("constant 3 is not known");
        if (!bytes && (s.in[1].c || s.constants[4])) bad("float32 sums have no residual");
        if (s.in[1].c) {
            if (!same_shape(s.in[1], s.out[0])) bad("shapes differ");
            code(s.ints[1]);
            bounded(255.0 * std::fabs(s.scalars[0]) + 255.0 * std::fabs(s.scalars[1]));
        } else if (s.constants[4]) {
            bad("constant 4 is not known");
        }
        table(4);
    }

    void add() {
        const Step& s = step_;
        if (!same_shape(s.in[0], s.in[1]) || !same_shape(s.in[0], s.out[0])) bad("shapes differ");
        bounded(255.0 * std::fabs(s.scalars[0]) + 255.0 * std::fabs(s.scalars[1]));
        table(0);
    }

    void factor() {  // of a picture, or one for all of its pixels
        const View &a = step_.in[0], &b = step_.in[1];
        if (!same_shape(a, b) && !(b.n == a.n && b.h == 1 && b.w == 1 && b.c == a.c)) bad("shapes differ");
    }

    void mul() {
        factor();
        same_one();
        bounded(255.0 * 255.0 * step_.scalars[0]);
        table(0);
    }

    void indices(int number, int count, int end) {
        const int32_t* index = constant<int32_t>(number, static_cast<uint64_t>(count));
        for (int i = 0; i < count; ++i)
            if (index[i] < 0 || index[i] >= end) bad("index %d of %d", index[i], end);
    }

    void weights(int number, int count) {
        const float* weight = constant<float>(number, static_cast<uint64_t>(count));
        for (int i = 0; i < count; ++i)
            if (!(weight[i] >= 0 && weight[i] <= 1)) bad("weight %g", weight[i]);
    }

    void resized() {
        if (step_.in[0].n != step_.out[0].n || step_.in[0].c != step_.out[0].c) bad("shapes differ");
    }

    void nearest() {
        const Step& s = step_;
        resized();
        indices(0, s.out[0].h, s.in[0].h);
        indices(1, s.out[0].w, s.in[0].w);
        if (s.out[0].dtype == Dtype::kF32) return constants(2);
        table(2);
    }

    void bilinear() {
        const Step& s = step_;
        resized();
        indices(0, 2 * s.out[0].h, s.in[0].h);
        weights(1, s.out[0].h);
        indices(2, 2 * s.out[0].w, s.in[0].w);
        weights(3, s.out[0].w);
        bounded(256.0 * s.scalars[0]);
        constants(4);
    }

    void gather() {
        const Step& s = step_;
        if (!same_pixels(s.in[0], s.out[0])) bad("shapes differ");
        indices(0, s.out[0].c, s.in[0].c);
        if (s.out[0].dtype == Dtype::kF32) return constants(1);
        table(1);
    }

    void conv_f32() {
        const Step& s = step_;
        window();
        const uint64_t outs = static_cast<uint64_t>(s.out[0].c), count = products(s.in[0].c) * outs;
        if (s.ints[0] == 1) {
            constant<int8_t>(0, count);
            constant<float>(2, outs);
        } else if (s.ints[0] == 0) {
            constant<float>(0, count);
            if (s.constants[2]) bad("constant 2 is not known");
        } else {
            bad("weights of type %d", s.ints[0]);
        }
        constant<float>(1, outs);
        constants(3);
    }

    // Nothing is read before something is written: no run sees memory of the one before.
    void flow() {
        std::vector<bool> written(header_->buffers);
        for (const PortPlan& p : net_.ports)
            if (!p.port.output) written[p.view.buffer] = true;
        for (size_t i = 0; i < net_.steps.size(); ++i) {
            for (const View& v : net_.steps[i].in)
                if (v.c && !written[v.buffer]) fail(EK_BAD_FILE, "payload: operator %zu: reads what nothing wrote", i);
            written[net_.steps[i].out[0].buffer] = true;
        }
    }

    const uint8_t* data_;
    size_t bytes_;
    const Header* header_ = nullptr;
    const Buffer* raw_buffers_ = nullptr;
    const Tensor* raw_tensors_ = nullptr;
    const Op* raw_ops_ = nullptr;
    const Port* raw_ports_ = nullptr;
    const uint8_t* constants_ = nullptr;
    std::vector<int> port_of_;  // by buffer
    Step step_;
    Network net_;
};

}  // namespace

Network check(const void* data, size_t bytes) { return Checker(data, bytes).all(); }

}  // namespace edgekit
