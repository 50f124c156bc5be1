// A payload that was checked, and what runs it.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "status.h"
#include "threads.h"

namespace edgekit {

// A block of memory: 64-byte aligned, zeroed, kSlack readable bytes behind it.
class Block {
  public:
    Block() = default;
    explicit Block(size_t bytes);  // throws std::bad_alloc
    uint8_t* data() const { return data_; }

  private:
    struct Free { void operator()(uint8_t* memory) const; };
    std::unique_ptr<uint8_t[], Free> memory_;
    uint8_t* data_ = nullptr;
};

struct BufferPlan {
    size_t bytes = 0;
    bool external = false;
    size_t at = 0;  // in the arena
};

struct PortPlan {
    Port port = {};
    View view;
    size_t bytes = 0;
    int next = -1;  // see ek_port
};

// What check() makes of a payload. Names and constants of its steps point into it.
struct Network {
    std::vector<BufferPlan> buffers;
    std::vector<View> tensors;
    std::vector<Step> steps;
    std::vector<PortPlan> ports;
    size_t weight_bytes = 0;
};

// Believes nothing. Throws Error with EK_BAD_FILE (or EK_UNSUPPORTED: a later version) where something is wrong; what
// it returns is safe to prepare and to run on any instruction set. check.cpp.
Network check(const void* data, size_t bytes);

// Immutable once made; shared by its handle and its sessions. The payload is not needed any more then.
class Engine {
  public:
    Engine(const void* data, size_t bytes, const ek_options& options);

    const std::vector<PortPlan>& ports() const { return net_.ports; }
    const Network& network() const { return net_; }
    const char* describe() const { return facts_.c_str(); }
    size_t arena_bytes() const { return arena_bytes_; }
    size_t scratch_bytes() const { return scratch_bytes_; }
    bool keeps() const { return keep_; }

    // One inference. scratch: scratch_bytes() for the calling thread. times: a number per step, or null.
    void run(const Frame& frame, uint8_t* scratch, uint64_t* times) const;

  private:
    void plan_arena();
    void prepare(const char* isa);
    void tell();

    Network net_;
    Store store_;
    size_t arena_bytes_ = 0, scratch_bytes_ = 0;
    bool keep_ = false;
    uint64_t split_ = 0;  // Step.work from which on the crew helps
    std::vector<const char*> kernels_;  // by step: the instruction set that runs it
    const char* isa_ = "";
    std::string facts_;
    std::unique_ptr<Crew> crew_;  // null: one thread
};

// Memory of one stream. Belongs to one thread at a time.
class Session {
  public:
    explicit Session(std::shared_ptr<const Engine> engine);

    const Engine& engine() const { return *engine_; }
    void* memory(size_t port) const { return buffers_[buffer(port)]; }
    void bind(size_t port, void* memory);
    void run();
    void turn();
    void reset();
    const void* tensor(size_t number) const;
    void profile(bool on);
    const std::vector<uint64_t>& times() const { return times_; }

  private:
    uint32_t buffer(size_t port) const { return engine_->ports()[port].view.buffer; }

    std::shared_ptr<const Engine> engine_;
    Block arena_, scratch_;
    std::vector<Block> own_;         // by port
    std::vector<uint8_t*> buffers_;  // by buffer
    std::vector<bool> bound_;        // by port: the caller's memory
    std::vector<uint64_t> times_;
};

}  // namespace edgekit

struct ek_engine {
    std::shared_ptr<const edgekit::Engine> engine;
};

struct ek_session {
    edgekit::Session session;
};
