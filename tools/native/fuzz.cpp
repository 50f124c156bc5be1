// Runs mutated payloads through the checker and, where they pass, through every instruction set of this machine:
//     fuzz <count> <seed> payload...
// Meant to be compiled with sanitizers (tools/fuzz_native.py). Every buffer is a block of its own, so that whatever is
// read or written beside a tensor's buffer is seen; the bytes behind it that may be read must not change. Results of
// all instruction sets must be the same. Prints what was done as JSON; a finding is written to fuzz-finding.ekn.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "engine.h"

using namespace edgekit;
using Bytes = std::vector<uint8_t>;

namespace {

std::mt19937_64 random_bits;
uint64_t below(uint64_t count) { return random_bits() % count; }
bool chance(uint64_t of) { return below(of) == 0; }

[[noreturn]] void finding(const Bytes& payload, const std::string& what) {
    std::ofstream("fuzz-finding.ekn", std::ios::binary).write(reinterpret_cast<const char*>(payload.data()),
                                                              static_cast<std::streamsize>(payload.size()));
    std::fprintf(stderr, "finding: %s; payload in fuzz-finding.ekn\n", what.c_str());
    std::exit(1);
}

// --- mutation ---

template <typename T> T read(const Bytes& data, size_t at) {
    T value;
    std::memcpy(&value, &data[at], sizeof(T));
    return value;
}

// A number of `size` bytes gets another value: near it, near a limit, that of a number elsewhere, or anything.
void number(Bytes& data, size_t at, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, &data[at], size);
    static const uint64_t odd[] = {0, 1, 2, 3, 4, 7, 16, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 16384, 65535, 65536,
                                   0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff, 0x100000000, 0x3fffffff, 0x40000000,
                                   0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff, 0xffffffffffffffc0};
    switch (below(6)) {
        case 0: value += below(5) - 2; break;
        case 1: value = odd[below(sizeof(odd) / sizeof(odd[0]))]; break;
        case 2: value ^= uint64_t{1} << below(8 * size); break;
        case 3: value = below(40); break;
        case 4: std::memcpy(&value, &data[below(data.size() / size) * size], size); break;
        default: value = random_bits() >> below(64); break;
    }
    std::memcpy(&data[at], &value, size);
}

void real(Bytes& data, size_t at) {
    static const float odd[] = {0.0f, -0.0f, 1.0f, -1.0f, 1e-40f, 1e30f, -1e30f, INFINITY, -INFINITY, NAN, 4e6f, 1e-30f};
    const float value = odd[below(sizeof(odd) / sizeof(odd[0]))];
    std::memcpy(&data[at], &value, 4);
}

// Where sections of the seed are; of the mutated payload the header may already be nonsense.
struct Section { size_t at, each, count; };

void mutate(Bytes& data, const Section sections[4], size_t constants_at) {
    const Section& s = sections[below(4)];
    switch (below(10)) {
        case 0:  // any bytes
            for (uint64_t i = 0, n = 1 + below(8); i < n; ++i) data[below(data.size())] = static_cast<uint8_t>(random_bits());
            return;
        case 1:  // the header
            number(data, 8 + 4 * below(20), chance(2) ? 4 : 8);
            return;
        case 2:  // constants
            if (constants_at < data.size()) {
                const size_t at = constants_at + below(data.size() - constants_at);
                if (chance(2)) real(data, std::min(at / 4 * 4, data.size() - 4)); else number(data, std::min(at / 4 * 4, data.size() - 4), 4);
            }
            return;
        case 3:  // an entry takes the place of another one
            if (s.count > 1) {
                const size_t from = s.at + below(s.count) * s.each, to = s.at + below(s.count) * s.each;
                std::memmove(&data[to], &data[from], s.each);
            }
            return;
        case 4:  // the file ends early, or later
            if (chance(8)) data.resize(chance(2) ? below(data.size()) + 1 : data.size() + 64 * (1 + below(3)));
            if (data.size() >= 40 && chance(2)) { const uint64_t size = data.size(); std::memcpy(&data[32], &size, 8); }
            return;
        default:  // a field of an entry
            if (!s.count) return;
            const size_t at = s.at + below(s.count) * s.each + 4 * below(s.each / 4);
            if (chance(8)) real(data, at); else number(data, at, at + 8 <= data.size() && chance(4) ? 8 : 4);
    }
}

// --- running ---

struct Memory {  // exactly so many bytes, aligned
    uint8_t* data = nullptr;
    explicit Memory(size_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, bytes ? bytes : 1)) std::abort();
        data = static_cast<uint8_t*>(memory);
    }
    ~Memory() { std::free(data); }
    Memory(Memory&& other) noexcept : data(other.data) { other.data = nullptr; }
    Memory(const Memory&) = delete;
};

double effort(const Network& net) {
    double total = 0;
    for (const Step& s : net.steps) {
        double each = double(s.out[0].pixels()) * s.out[0].c * s.kernel[0] * s.kernel[1];
        if (s.type == OpType::kConv || s.type == OpType::kConvF32) each *= double(s.in[0].c + s.in[2].c) / s.group;
        total += each + 100;
    }
    return total;
}

// What is in all buffers after a run.
std::vector<Bytes> outcome(const Bytes& payload, const Memory& file, size_t bytes, const char* isa, uint32_t threads, uint64_t seed) {
    ek_options options = {};
    options.size = sizeof(options);
    options.isa = isa;
    options.threads = threads;
    options.spin_us = ~0u;
    const Engine engine = [&] {  // which does not need the payload any more
        const Memory gone(bytes);
        std::memcpy(gone.data, file.data, bytes);
        return Engine(gone.data, bytes, options);
    }();
    const Network& net = engine.network();
    std::mt19937_64 values(seed);
    std::vector<Memory> memory;
    std::vector<uint8_t*> buffers;
    std::vector<bool> floats(net.buffers.size());
    for (const View& v : net.tensors) floats[v.buffer] = v.dtype == Dtype::kF32;
    for (size_t i = 0; i < net.buffers.size(); ++i) {
        const size_t size = net.buffers[i].bytes;
        memory.emplace_back(size + kSlack);
        buffers.push_back(memory.back().data);
        if (floats[i]) {
            std::normal_distribution<float> normal(0, 3);
            for (size_t k = 0; k + 4 <= size; k += 4) {
                const float value = normal(values);
                std::memcpy(buffers[i] + k, &value, 4);
            }
        } else {
            for (size_t k = 0; k < size; ++k) buffers[i][k] = static_cast<uint8_t>(values());
        }
        std::memset(buffers[i] + size, 0xa5, kSlack);
    }
    const Memory scratch(engine.scratch_bytes());
    const Frame frame{buffers.data()};
    engine.run(frame, scratch.data, nullptr);
    std::vector<Bytes> found;
    for (size_t i = 0; i < net.buffers.size(); ++i) {
        const uint8_t* behind = buffers[i] + net.buffers[i].bytes;
        for (int k = 0; k < kSlack; ++k)
            if (behind[k] != 0xa5) finding(payload, std::string(isa) + " wrote behind a buffer");
        found.emplace_back(static_cast<const uint8_t*>(buffers[i]), behind);
    }
    Session session(std::make_shared<const Engine>(file.data, bytes, options));  // with its arena and states
    session.run();
    session.turn();
    session.run();
    return found;
}

bool same(const Bytes& a, const Bytes& b, bool floats) {
    if (!floats) return a == b;
    for (size_t k = 0; k + 4 <= a.size(); k += 4) {
        const float x = read<float>(a, k), y = read<float>(b, k);
        if (std::memcmp(&x, &y, 4) && !(std::isnan(x) && std::isnan(y))) return false;
    }
    return true;
}

std::map<std::string, uint64_t> counts;

void tries(const Bytes& payload) {
    const Memory file(payload.size());
    std::memcpy(file.data, payload.data(), payload.size());
    try {
        const Network net = check(file.data, payload.size());
        ++counts["accepted"];
        double bytes = 0;
        for (const BufferPlan& b : net.buffers) bytes += static_cast<double>(b.bytes);
        if (bytes > 4e6 || effort(net) > 3e6) {
            ++counts["accepted, too large to run here"];
            return;
        }
        std::vector<bool> floats(net.buffers.size());
        for (const View& v : net.tensors) floats[v.buffer] = v.dtype == Dtype::kF32;
        const uint64_t seed = random_bits();
        const std::vector<Bytes> want = outcome(payload, file, payload.size(), "scalar", 1, seed);
        ++counts["run: scalar"];
        for (int i = 0; i < kIsaCount - 1; ++i) {
            if (!kIsas[i]->here()) continue;
            const std::vector<Bytes> got = outcome(payload, file, payload.size(), kIsas[i]->name, chance(16) ? 2 : 1, seed);
            ++counts[std::string("run: ") + kIsas[i]->name];
            for (size_t k = 0; k < want.size(); ++k)
                if (!same(want[k], got[k], floats[k]))
                    finding(payload, std::string(kIsas[i]->name) + " differs from scalar in buffer " + std::to_string(k));
        }
    } catch (const Error& error) {
        ++counts[error.status == EK_BAD_FILE ? "refused" : error.status == EK_UNSUPPORTED ? "refused: version" : "refused: other"];
        if (error.text.empty()) finding(payload, "refused without a word");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) return std::fprintf(stderr, "usage: fuzz <count> <seed> payload...\n"), 2;
    setenv("EDGEKIT_NATIVE_SPLIT", "0", 1);
    const uint64_t count = std::strtoull(argv[1], nullptr, 10);
    random_bits.seed(std::strtoull(argv[2], nullptr, 10));
    std::vector<Bytes> seeds;
    for (int i = 3; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        const uint64_t before = counts["accepted"];
        tries(seeds.back());
        if (counts["accepted"] == before) return std::fprintf(stderr, "%s: refused as it is\n", argv[i]), 1;
    }
    counts.clear();
    double longest = 0;
    for (uint64_t i = 0; i < count; ++i) {
        Bytes data = seeds[below(seeds.size())];
        const Header h = read<Header>(data, 0);
        const Section sections[4] = {{h.buffers_at, sizeof(Buffer), h.buffers}, {h.tensors_at, sizeof(Tensor), h.tensors},
                                     {h.ops_at, sizeof(Op), h.ops}, {h.ports_at, sizeof(Port), h.ports}};
        for (uint64_t k = 0, n = chance(3) ? 1 + below(4) : 1; k < n && data.size() == h.file_bytes; ++k)
            mutate(data, sections, h.constants_at);
        const auto start = std::chrono::steady_clock::now();
        tries(data);
        longest = std::max(longest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::printf("{\"mutated payloads\": %llu, \"seed payloads\": %zu, \"longest s\": %.3f", static_cast<unsigned long long>(count),
                seeds.size(), longest);
    for (const auto& [name, number] : counts) std::printf(", \"%s\": %llu", name.c_str(), static_cast<unsigned long long>(number));
    std::printf("}\n");
}
