// The payload of the native engine, as it lies in the file: little-endian, read where it lies while it is loaded.
//
//   Header | Buffer[buffers] | Tensor[tensors] | Op[ops] | Port[ports] | constants
//
// Every section starts at a multiple of 64 bytes. Nothing here is believed before check.cpp has seen it.
// backends/native/format.py writes the same; docs/native.md says what every operator computes, to the bit.
#pragma once

#include <cstdint>

namespace edgekit {

constexpr char kMagic[8] = {'E', 'K', 'N', 'A', 'T', 'I', 'V', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kNone = 0xffffffffu;  // no tensor
constexpr int kSlack = 64;               // bytes behind every buffer that kernels may read, never write

enum class Dtype : uint32_t { kU8 = 0, kF32 = 1 };

// What happens to a sum before it is stored (see Op.act).
enum class Act : uint32_t {
    kNone = 0,
    kTable = 1,  // u8 -> u8 by 256 entries, after rounding to the code before the activation
    kCurve = 2,  // straight from the sum: 64 line segments in int16, rounded once
    // of operators that compute in float32:
    kRelu = 16, kClip = 17, kLeakyRelu = 18, kSigmoid = 19, kSilu = 20, kHardSwish = 21, kHardSigmoid = 22,
    kTanh = 23, kGelu = 24, kExp = 25,
};

enum class OpType : uint32_t {
    kConv = 0,       // u8 -> u8 | f32; dense, grouped and depthwise; a Gemm is one of 1x1 on 1x1 pictures
    kAdd = 1,        // u8, u8 -> u8
    kMul = 2,        // u8, u8 -> u8; the second may have one pixel (a scale per channel)
    kTable = 3,      // u8 -> u8, code by code; also copies and changes of scale
    kMaxPool = 4,    // u8 -> u8
    kAvgPool = 5,    // u8 -> u8; windows as wide as the picture are global pooling
    kNearest = 6,    // u8 -> u8 | f32 -> f32, resize by index
    kBilinear = 7,   // u8 -> u8 | f32 -> f32
    kGather = 8,     // u8 -> u8 | f32 -> f32, channels by index: shuffles, slices with a step
    kQuantize = 9,   // f32 -> u8
    kDequantize = 10,  // u8 -> f32 by 256 floats: also any function of a code (a sigmoid at the end)
    kConvF32 = 16,   // f32 -> f32; weights float32, or int8 with a scale per output channel
    kAddF32 = 17, kMulF32 = 18, kUnaryF32 = 19, kMaxPoolF32 = 20, kAvgPoolF32 = 21, kSoftmaxF32 = 22, kCopyF32 = 23,
};

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t buffers, tensors, ops, ports;
    uint32_t reserved;  // 0
    uint64_t file_bytes;
    uint64_t buffers_at, tensors_at, ops_at, ports_at;
    uint64_t constants_at, constants_bytes;
};
static_assert(sizeof(Header) == 88, "Header");

struct Buffer {
    uint64_t bytes;     // without the slack
    uint32_t external;  // 1: a port's, given by who runs; 0: in the arena, from the first op that writes it to the last that reads it
    uint32_t reserved;  // 0
};
static_assert(sizeof(Buffer) == 16, "Buffer");

// Pictures [n, h, w, c], channels last: element (i, y, x, k) is number ((i*h + y)*w + x)*pitch + offset + k of its buffer.
// Several tensors may be channel ranges of one buffer (or ranges of its pixels: offsets of pitch and more): what joins or
// splits them then costs nothing. All tensors of a buffer have one dtype; what an op writes must not overlap what it reads.
struct Tensor {
    uint32_t buffer;
    uint32_t dtype;     // Dtype
    uint32_t shape[4];  // n, h, w, c
    uint64_t offset;    // elements
    uint64_t pitch;     // elements between neighbouring pixels, >= offset % pitch + c
    float scale;        // u8: real = scale * (code - zero)
    int32_t zero;       // 0..255
    uint32_t reserved[2];  // 0
};
static_assert(sizeof(Tensor) == 56, "Tensor");

struct Range {
    uint64_t at;  // within the constants, a multiple of 64
    uint64_t bytes;
};

// What ints, scalars and constants mean: docs/native.md, operator by operator.
struct Op {
    uint32_t type;  // OpType
    uint32_t act;   // Act
    uint32_t inputs[4], outputs[2];  // tensors, kNone
    uint32_t kernel[2], stride[2], dilation[2];
    uint32_t pad[4];  // top, left, bottom, right
    uint32_t group;
    int32_t ints[5];
    float scalars[6];
    Range constants[6];
    Range name;  // UTF-8, for people; anywhere in the constants
};
static_assert(sizeof(Op) == 232, "Op");

struct Port {
    char name[96];      // UTF-8, ends with a 0
    uint32_t tensor;    // all of its buffer (others may be parts of it), external; no op writes an input
    uint32_t output;    // 0 input, 1 output
    uint32_t state;     // kNone, or of an input: number of the output port that is its next value
    uint32_t rank;      // axes that sessions see
    uint32_t shape[8];  // what sessions see; as many elements as the tensor, in C order unless ...
    uint32_t channels_last;  // 1: ... they see [N, C, ...] of what lies as [N, ..., C]
    uint32_t reserved;       // 0
};
static_assert(sizeof(Port) == 152, "Port");

}  // namespace edgekit
