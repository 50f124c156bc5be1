// What an instruction set brings to the engine: how to prepare a step, and how to run a part of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "payload.h"

namespace edgekit {

// A tensor as a kernel sees it; where its buffer lies is only known when it runs. c = 0: there is none.
struct View {
    uint32_t buffer = 0;
    Dtype dtype = Dtype::kU8;
    int n = 0, h = 0, w = 0, c = 0;
    ptrdiff_t offset = 0, pitch = 0;  // elements
    float scale = 1;
    int zero = 0;
    int pixels() const { return n * h * w; }
};

// Bytes for a session: buffer number -> its first byte.
struct Frame {
    uint8_t* const* buffers;
    uint8_t* bytes(const View& v) const { return buffers[v.buffer] + v.offset; }
    float* floats(const View& v) const { return reinterpret_cast<float*>(buffers[v.buffer]) + v.offset; }
};

struct Step;
// Computes units [begin, end) of the step. scratch: Step.scratch bytes, 64-byte aligned, this thread's own, unknown content.
// Units may run in any order on any threads: each writes what no other one touches. No allocation, lock or exception here.
using Run = void (*)(const Step&, const Frame&, int begin, int end, uint8_t* scratch);

// One operator, checked, with what a kernel worked out ahead. Immutable after the load.
struct Step {
    OpType type = OpType::kConv;
    Act act = Act::kNone;
    View in[4], out[2];
    int inputs = 0, outputs = 0;
    int kernel[2] = {1, 1}, stride[2] = {1, 1}, dilation[2] = {1, 1}, pad[4] = {0, 0, 0, 0};
    int group = 1;
    int32_t ints[5] = {};
    float scalars[6] = {};
    const uint8_t* constants[6] = {};  // or null; of convolutions 0..2 only while they are prepared, and for scalar
    size_t constant_bytes[6] = {};
    const char* name = "";
    int name_bytes = 0;

    Run run = nullptr;
    int units = 1;          // what can be split among threads; 1: not at all
    size_t scratch = 0;     // bytes a thread needs
    uint64_t work = 0;      // about how many multiplications or bytes: small steps are not split
    const void* prepared = nullptr;  // the kernel's own, from Store
};

inline uint64_t window_size(const Step& s) { return static_cast<uint64_t>(s.kernel[0]) * static_cast<uint64_t>(s.kernel[1]); }

// Units are rows of outputs, of all pictures. work: of an output; scratch: bytes a thread needs. true: what prepare() gives.
inline bool by_rows(Step& s, uint64_t work, size_t scratch = 0) {
    const View& out = s.out[0];
    s.units = out.n * out.h;
    s.scratch = scratch;
    s.work = static_cast<uint64_t>(out.pixels()) * static_cast<uint64_t>(out.c) * work;
    return true;
}

// Memory that prepare() may keep for as long as the engine lives: 64-byte aligned, zeroed, kSlack readable bytes behind.
class Store {
  public:
    uint8_t* bytes(size_t count);
    template <typename T> T* array(size_t count) { return reinterpret_cast<T*>(bytes(count * sizeof(T))); }
    size_t total() const { return total_; }

  private:
    std::vector<std::unique_ptr<uint8_t[]>> blocks_;
    size_t total_ = 0;
};

struct Isa {
    const char* name;       // as in docs/native.md and EDGEKIT_NATIVE_ISA
    bool (*here)();         // whether this CPU (and its system) has it
    // Sets run, units, scratch, work, prepared. false: not a case it does; the next set of the list is asked.
    bool (*prepare)(Step&, Store&);
};

// Best first; the last one is "scalar", which does everything and defines the result.
extern const Isa* const kIsas[];
extern const int kIsaCount;

// Each in a file of its own, made only for its architecture.
extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx512, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Isa kNeonI8mm, kNeonDot, kNeon;
#endif

}  // namespace edgekit
