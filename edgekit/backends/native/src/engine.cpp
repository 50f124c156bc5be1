#pragma GCC optimize("Os")  // nothing here is on the way of a run

#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace edgekit {

// --- failing ---

namespace {
thread_local std::string last_error;
}

void fail(ek_status status, const char* format, ...) {
    char line[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(line, sizeof(line), format, list);
    va_end(list);
    throw Error{status, line};
}

ek_status remember(ek_status status, const char* text) noexcept {
    try {
        last_error = text;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

const char* last_error_text() noexcept { return last_error.c_str(); }

// --- memory ---

namespace {
constexpr size_t kAlign = 64;
uint8_t* aligned(uint8_t* memory) { return memory + (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign) % kAlign; }
size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
}  // namespace

void Block::Free::operator()(uint8_t* memory) const { std::free(memory); }

Block::Block(size_t bytes) : memory_(static_cast<uint8_t*>(std::calloc(bytes + kAlign + kSlack, 1))) {
    if (!memory_) throw std::bad_alloc();
    data_ = aligned(memory_.get());
}

uint8_t* Store::bytes(size_t count) {
    blocks_.emplace_back(new uint8_t[count + kAlign + kSlack]());
    total_ += count;
    return aligned(blocks_.back().get());
}

// --- instruction sets ---

const Isa* const kIsas[] = {
#if defined(__x86_64__)
#if __has_include("avx512.cpp")
    &kAvx512,
#endif
#if __has_include("avxvnni.cpp")
    &kAvxVnni,
#endif
#if __has_include("avx2.cpp")
    &kAvx2,
#endif
#elif defined(__aarch64__)
#if __has_include("neon_i8mm.cpp")
    &kNeonI8mm,
#endif
#if __has_include("neon_dot.cpp")
    &kNeonDot,
#endif
#if __has_include("neon.cpp")
    &kNeon,
#endif
#endif
    &kScalar,
};
const int kIsaCount = static_cast<int>(sizeof(kIsas) / sizeof(kIsas[0]));

namespace {

// Where the search for kernels begins. Throws Error for a set that is not known, or not of this CPU.
int first_isa(const char* asked) {
    const char* wanted = asked && *asked ? asked : std::getenv("EDGEKIT_NATIVE_ISA");
    for (int i = 0; i < kIsaCount; ++i) {
        if (wanted && *wanted && std::strcmp(wanted, kIsas[i]->name)) continue;
        if (kIsas[i]->here()) return i;
        if (wanted && *wanted) fail(EK_UNSUPPORTED, "instruction set %s: this CPU does not have it", wanted);
    }
    fail(EK_BAD_ARGUMENT, "instruction set %s: not known here", wanted ? wanted : "");
}

constexpr uint64_t kWorthSplitting = 1 << 15;  // Step.work; EDGEKIT_NATIVE_SPLIT gives another limit
constexpr uint32_t kSpin = 50;                 // microseconds
constexpr uint32_t kMostThreads = 64;
constexpr int kConstants = sizeof(Step::constants) / sizeof(Step::constants[0]);

const char* type_name(OpType type) {
    static const char* const names[] = {"conv",        "add",        "mul",     "table",    "max_pool",     "avg_pool",
                                        "nearest",     "bilinear",   "gather",  "quantize", "dequantize",   "",
                                        "",            "",           "",        "",         "conv_f32",     "add_f32",
                                        "mul_f32",     "unary_f32",  "max_pool_f32", "avg_pool_f32", "softmax_f32", "copy_f32"};
    return names[static_cast<uint32_t>(type)];
}

// Constants that kernels pack while they prepare, and scalar reads as they are: weights, biases, multipliers.
int packed_constants(const Step& step) { return step.type == OpType::kConv || step.type == OpType::kConvF32 ? 3 : 0; }

// Constants [first, end) get memory of the engine's own: its payload need not stay.
void take(Step& step, int first, int end, Store& store) {
    for (int i = first; i < end; ++i) {
        if (!step.constants[i]) continue;
        uint8_t* copy = store.bytes(step.constant_bytes[i]);
        std::memcpy(copy, step.constants[i], step.constant_bytes[i]);
        step.constants[i] = copy;
    }
}

void quote(std::string& to, const char* text, int bytes) {
    to += '"';
    for (int i = 0; i < bytes; ++i) {
        if (text[i] == '"' || text[i] == '\\') to += '\\';
        to += text[i];
    }
    to += '"';
}

}  // namespace

// --- engine ---

Engine::Engine(const void* data, size_t bytes, const ek_options& options)
    : net_(check(data, bytes)), keep_(options.keep != 0), split_(kWorthSplitting) {
    if (options.threads > kMostThreads) fail(EK_BAD_ARGUMENT, "threads: at most %u, got %u", kMostThreads, options.threads);
    prepare(options.isa);
    plan_arena();
    if (const char* split = std::getenv("EDGEKIT_NATIVE_SPLIT")) split_ = std::strtoull(split, nullptr, 10);
    const int helpers = options.threads > 1 ? static_cast<int>(options.threads) - 1 : 0;
    if (helpers) crew_.reset(new Crew(helpers, scratch_bytes_, options.spin_us == ~0u ? kSpin : options.spin_us));
    tell();
}

void Engine::prepare(const char* asked) {
    const int first = first_isa(asked);
    isa_ = kIsas[first]->name;
    for (Step& step : net_.steps) {
        int i = first;
        const int packed = packed_constants(step);
        take(step, packed, kConstants, store_);
        while (!(kIsas[i]->here() && kIsas[i]->prepare(step, store_)))
            if (++i == kIsaCount) fail(EK_INTERNAL, "operator %.*s: nobody runs it", step.name_bytes, step.name);
        if (kIsas[i] == &kScalar) take(step, 0, packed, store_);
        else std::fill_n(step.constants, packed, nullptr);
        kernels_.push_back(kIsas[i]->name);
        scratch_bytes_ = std::max(scratch_bytes_, step.scratch);
    }
}

// Every buffer gets the lowest place that is free from the first step that writes it to the last that reads it, the
// largest ones first.
void Engine::plan_arena() {
    struct Place {
        size_t number, bytes;
        int first, last;
    };
    std::vector<Place> places(net_.buffers.size());
    for (size_t i = 0; i < places.size(); ++i) places[i] = {i, rounded(net_.buffers[i].bytes + kSlack), -1, -1};
    for (int i = 0; i < static_cast<int>(net_.steps.size()); ++i) {
        const Step& step = net_.steps[static_cast<size_t>(i)];
        const auto use = [&](const View& v) {
            Place& p = places[v.buffer];
            if (p.first < 0) p.first = i;
            p.last = i;
        };
        for (const View& v : step.in) if (v.c) use(v);
        for (const View& v : step.out) if (v.c) use(v);
    }
    places.erase(std::remove_if(places.begin(), places.end(), [&](const Place& p) {
        return net_.buffers[p.number].external || (p.first < 0 && !keep_);
    }), places.end());
    std::stable_sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.bytes > b.bytes; });
    std::vector<const Place*> near;  // those placed, by where they lie
    for (const Place& p : places) {
        size_t at = 0;
        for (const Place* other : near) {
            const size_t begin = net_.buffers[other->number].at;
            if (!keep_ && (other->last < p.first || p.last < other->first)) continue;
            if (at + p.bytes <= begin) break;
            at = std::max(at, begin + other->bytes);
        }
        net_.buffers[p.number].at = at;
        arena_bytes_ = std::max(arena_bytes_, at + p.bytes);
        near.insert(std::upper_bound(near.begin(), near.end(), &p, [&](const Place* a, const Place* b) {
            return net_.buffers[a->number].at < net_.buffers[b->number].at;
        }), &p);
    }
}

void Engine::tell() {
    char line[160];
    std::snprintf(line, sizeof(line), "{\"isa\": \"%s\", \"threads\": %d, \"arena_bytes\": %zu, \"weight_bytes\": %zu, "
                  "\"prepared_bytes\": %zu, \"steps\": [", isa_, crew_ ? crew_->people() : 1, arena_bytes_,
                  net_.weight_bytes, store_.total());
    facts_ = line;
    for (size_t i = 0; i < net_.steps.size(); ++i) {
        facts_ += i ? ", {\"name\": " : "{\"name\": ";
        quote(facts_, net_.steps[i].name, net_.steps[i].name_bytes);
        facts_ += std::string(", \"type\": \"") + type_name(net_.steps[i].type) + "\", \"kernel\": \"" + kernels_[i] + "\"}";
    }
    facts_ += "]}";
    for (Step& step : net_.steps) step.name = "", step.name_bytes = 0;  // they lie in the payload
}

void Engine::run(const Frame& frame, uint8_t* scratch, uint64_t* times) const {
    Crew* crew = crew_ && crew_->enter() ? crew_.get() : nullptr;  // another session's turn: this one works alone
    auto before = std::chrono::steady_clock::now();
    for (const Step& step : net_.steps) {
        if (crew && step.units > 1 && step.work >= split_)
            crew->work(step, frame, scratch);
        else
            step.run(step, frame, 0, step.units, scratch);
        if (!times) continue;
        const auto now = std::chrono::steady_clock::now();
        *times++ = static_cast<uint64_t>(std::chrono::nanoseconds(now - before).count());
        before = now;
    }
    if (crew) crew->leave();
}

// --- session ---

Session::Session(std::shared_ptr<const Engine> engine)
    : engine_(std::move(engine)), arena_(engine_->arena_bytes()), scratch_(engine_->scratch_bytes()) {
    const Network& net = engine_->network();
    for (const BufferPlan& b : net.buffers) buffers_.push_back(b.external ? nullptr : arena_.data() + b.at);
    for (const PortPlan& p : net.ports) {
        own_.emplace_back(p.bytes);
        buffers_[p.view.buffer] = own_.back().data();
    }
    bound_.assign(net.ports.size(), false);
    reset();
}

void Session::bind(size_t port, void* memory) {
    if (reinterpret_cast<uintptr_t>(memory) % kAlign)
        fail(EK_BAD_ARGUMENT, "port %s: memory is not aligned to 64 bytes", engine_->ports()[port].port.name);
    buffers_[buffer(port)] = static_cast<uint8_t*>(memory);
    bound_[port] = true;
}

void Session::run() {
    const Frame frame{buffers_.data()};
    engine_->run(frame, scratch_.data(), times_.empty() ? nullptr : times_.data());
}

void Session::turn() {
    for (size_t i = 0; i < own_.size(); ++i) {
        const PortPlan& now = engine_->ports()[i];
        if (now.next < 0) continue;
        const size_t next = static_cast<size_t>(now.next);
        if (!bound_[i] && !bound_[next])
            std::swap(buffers_[buffer(i)], buffers_[buffer(next)]);
        else
            std::memcpy(buffers_[buffer(i)], buffers_[buffer(next)], now.bytes);
    }
}

void Session::reset() {
    for (size_t i = 0; i < own_.size(); ++i) {
        const PortPlan& p = engine_->ports()[i];
        if (p.next >= 0) std::memset(buffers_[buffer(i)], p.view.zero, p.bytes);
    }
}

const void* Session::tensor(size_t number) const {
    const View& v = engine_->network().tensors[number];
    return buffers_[v.buffer] + v.offset * (v.dtype == Dtype::kF32 ? 4 : 1);
}

void Session::profile(bool on) { times_.assign(on ? engine_->network().steps.size() : 0, 0); }

}  // namespace edgekit
