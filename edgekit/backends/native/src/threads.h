// The crew: threads that help one run at a time, and sleep between runs.
#pragma once

#include <atomic>
#include <algorithm>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace edgekit {

class Crew {
  public:
    // helpers: threads besides the caller. scratch: bytes for each. spin_us: how long one looks for work within a run.
    Crew(int helpers, size_t scratch, uint32_t spin_us);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    // Whether the crew is free; then it is the caller's until leave().
    int people() const { return static_cast<int>(threads_.size()) + 1; }
    bool enter();
    void leave();
    // All units of a step, by the caller and whoever is awake. Returns when they are done.
    void work(const Step& step, const Frame& frame, uint8_t* scratch);

  private:
    void help(int number);
    bool part(uint32_t job, int number, uint8_t* scratch);
    static void sleep(std::atomic<uint32_t>& word, uint32_t seen);
    static void wake(std::atomic<uint32_t>& word, int count);

    // What is left of one person's share of a job: job << 32 | next << 16 | end, in grains of units. Everybody begins
    // with the own share, which lies where it lay in the step before, and goes on with what others have left. Who takes
    // grains raises `next`; that cannot succeed once the job is over, since then nothing is left, nor in another job.
    // A job is only made when all units of the one before are done: what describes it stays while grains are left.
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<uint32_t> job_{0};
    std::atomic<const Step*> step_{nullptr};
    std::atomic<const Frame*> frame_{nullptr};
    std::atomic<int> units_{0}, grain_{1};
    alignas(64) std::atomic<uint32_t> done_{0};  // units
    alignas(64) std::atomic<uint32_t> bell_{0};  // rung for every job while somebody sleeps
    std::atomic<int> asleep_{0};
    std::atomic<bool> waiting_{false}, running_{false}, closing_{false};
    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
    uint32_t spin_us_;
    std::vector<std::unique_ptr<uint8_t[]>> scratch_;
    std::vector<std::thread> threads_;
};

}  // namespace edgekit
