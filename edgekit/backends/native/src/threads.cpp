#include "threads.h"

#include <chrono>
#include <climits>
#include <cstring>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace edgekit {
namespace {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;
constexpr int kMostGrains = 4096;  // of a job
constexpr int kLooks = 64;         // between two looks at the clock

}  // namespace

Crew::Crew(int helpers, size_t scratch, uint32_t spin_us)
    : shares_(new Share[static_cast<size_t>(helpers) + 1]), spin_us_(spin_us) {
    for (int i = 0; i < helpers; ++i) scratch_.emplace_back(new uint8_t[scratch + 128]());
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this, i] { help(i + 1); });
}

Crew::~Crew() {
    closing_ = true;
    bell_.fetch_add(1);
    wake(bell_, INT_MAX);
    for (std::thread& thread : threads_) thread.join();
}

bool Crew::enter() {
    if (taken_.test_and_set(std::memory_order_acquire)) return false;
    running_.store(true, std::memory_order_relaxed);
    return true;
}

void Crew::leave() {
    running_.store(false, std::memory_order_relaxed);
    taken_.clear(std::memory_order_release);
}

void Crew::work(const Step& step, const Frame& frame, uint8_t* scratch) {
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    const int all = people(), grain = (step.units + kMostGrains - 1) / kMostGrains;
    const uint64_t grains = static_cast<uint64_t>((step.units + grain - 1) / grain);
    step_.store(&step, std::memory_order_relaxed);
    frame_.store(&frame, std::memory_order_relaxed);
    units_.store(step.units, std::memory_order_relaxed);
    grain_.store(grain, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int i = 0; i < all; ++i) {
        const uint64_t next = grains * static_cast<uint64_t>(i) / static_cast<uint64_t>(all);
        const uint64_t end = grains * static_cast<uint64_t>(i + 1) / static_cast<uint64_t>(all);
        shares_[static_cast<size_t>(i)].left.store(static_cast<uint64_t>(job) << 32 | next << 16 | end, std::memory_order_release);
    }
    job_.store(job);
    if (asleep_.load() > 0) {
        bell_.fetch_add(1);
        wake(bell_, INT_MAX);
    }
    while (part(job, 0, scratch)) {}
    const uint32_t units = static_cast<uint32_t>(step.units);
    Clock::time_point start{};  // of the wait: the clock is not asked where there is none
    for (uint32_t done; (done = done_.load(std::memory_order_acquire)) != units;) {
        for (int i = 0; i < kLooks && done_.load(std::memory_order_relaxed) == done; ++i) relax();
        if (start == Clock::time_point{}) start = Clock::now();
        if (Clock::now() - start < std::chrono::microseconds(spin_us_)) continue;
        waiting_.store(true);
        sleep(done_, done);  // returns at once where it has changed
        waiting_.store(false);
    }
}

// Takes half of what is left of the first share that has something, and does it. false: nothing is left.
bool Crew::part(uint32_t job, int number, uint8_t* scratch) {
    const int all = people();
    for (int i = 0; i < all; ++i) {
        std::atomic<uint64_t>& left = shares_[static_cast<size_t>((number + i) % all)].left;
        uint64_t seen = left.load(std::memory_order_acquire);
        for (;;) {
            const int next = static_cast<int>(seen >> 16 & 0xffff), end = static_cast<int>(seen & 0xffff);
            if (static_cast<uint32_t>(seen >> 32) != job || next >= end) break;
            const int count = (end - next + 1) / 2, grain = grain_.load(std::memory_order_relaxed);
            const int units = units_.load(std::memory_order_relaxed);
            const Step* step = step_.load(std::memory_order_relaxed);
            const Frame* frame = frame_.load(std::memory_order_relaxed);
            const uint64_t after = seen + (static_cast<uint64_t>(count) << 16);
            if (!left.compare_exchange_weak(seen, after, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            const int begin = next * grain, stop = std::min(units, (next + count) * grain);
            step->run(*step, *frame, begin, stop, scratch);
            done_.fetch_add(static_cast<uint32_t>(stop - begin));
            if (waiting_.load()) wake(done_, 1);
            return true;
        }
    }
    return false;
}

void Crew::help(int number) {
#if defined(__linux__)
    prctl(PR_SET_NAME, "edgekit");
#endif
    uint8_t* memory = scratch_[static_cast<size_t>(number) - 1].get();
    uint8_t* scratch = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
    uint32_t last = 0;
    Clock::time_point idle{};  // since when, once it has looked for a while
    while (!closing_.load()) {
        const uint32_t bell = bell_.load(), job = job_.load();
        if (job != last) {
            while (part(job, number, scratch)) {}
            last = job;
            idle = {};
            continue;
        }
        for (int i = 0; i < kLooks && job_.load(std::memory_order_relaxed) == last; ++i) relax();
        if (job_.load(std::memory_order_relaxed) != last) continue;
        if (idle == Clock::time_point{}) idle = Clock::now();
        if (running_.load(std::memory_order_relaxed) && Clock::now() - idle < std::chrono::microseconds(spin_us_)) continue;
        asleep_.fetch_add(1);
        const bool missed = job_.load() != last;
        if (!missed && !closing_.load()) sleep(bell_, bell);
        asleep_.fetch_sub(1);
        idle = {};
    }
}

#if defined(__linux__)

void Crew::sleep(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void Crew::wake(std::atomic<uint32_t>& word, int count) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

#else

void Crew::sleep(std::atomic<uint32_t>& word, uint32_t seen) {
    while (word.load() == seen) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

void Crew::wake(std::atomic<uint32_t>&, int) {}

#endif

}  // namespace edgekit
