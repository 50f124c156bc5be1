// Threads of the native kernels: one pool for the whole module, started by the first call that wants it.
//
// parallel_for cuts [0, n) into chunks of `grain` and runs each once. Where the cuts lie depends on n and grain
// only, never on the number of threads; which thread takes which chunk is left to chance. So a kernel whose
// chunks write apart from each other (or leave partial results per chunk, added up in order afterwards) gives the
// same bits for every thread count.
//
// The caller works too, so a call within a call and calls from several Python threads cannot wait for each other.
// Idle threads sleep on a condition variable; nothing spins. After fork() the child starts a pool of its own.
// Release the GIL before the call; `fn` must not touch Python.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace edgekit {

// CPUs that this process may run on.
inline int allowed_cpus() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
public:
    static constexpr int kMost = 256;

    // The pool, never destroyed: its threads may outlive static objects.
    static Pool& get() {
        Pool* pool = instance().load(std::memory_order_acquire);
        if (pool == nullptr) {
            static std::mutex creation;  // a fork inside of it is a fork before the first call
            std::lock_guard<std::mutex> lock(creation);
            pool = instance().load(std::memory_order_acquire);
            if (pool == nullptr) {
                pool = new Pool;
                instance().store(pool, std::memory_order_release);
#if defined(__linux__)
                static const int hooked = pthread_atfork(nullptr, nullptr, [] {
                    instance().store(nullptr, std::memory_order_release);  // its threads are not in the child
                });
                static_cast<void>(hooked);
#endif
            }
        }
        return *pool;
    }

    struct Job {
        void (*call)(void*, int64_t, int64_t);
        void* context;
        int64_t n, grain, chunks;
        int wanted;  // helpers that may still join; under the mutex, as is `active`
        int active = 0;
        std::atomic<int64_t> next{0};
        std::mutex failure;
        int64_t failed = INT64_MAX;
        std::exception_ptr error;

        void work() {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
                try {
                    call(context, i * grain, std::min(n, (i + 1) * grain));
                } catch (...) {
                    std::lock_guard<std::mutex> lock(failure);
                    if (i < failed) failed = i, error = std::current_exception();
                }
            }
        }
    };

    void run(Job& job) {
        const bool one = job.wanted == 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (int(count_) < std::min(job.wanted, kMost)) {
                    std::thread(&Pool::loop, this).detach();
                    count_++;
                }
            } catch (const std::system_error&) {
                // the system has no more threads to give: those that there are, and the caller, do the work
            }
            jobs_.push_back(&job);
        }
        if (one) wake_.notify_one();
        else wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        const auto at = std::find(jobs_.begin(), jobs_.end(), &job);
        if (at != jobs_.end()) jobs_.erase(at);  // nobody joins from here on
        done_.wait(lock, [&] { return job.active == 0; });
    }

private:
    static std::atomic<Pool*>& instance() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !jobs_.empty(); });
            Job* job = jobs_.front();
            job->active++;
            if (--job->wanted == 0) jobs_.erase(jobs_.begin());
            lock.unlock();
            job->work();
            lock.lock();
            // all chunks are taken: no other helper need look at it
            const auto at = std::find(jobs_.begin(), jobs_.end(), job);
            if (at != jobs_.end()) jobs_.erase(at);
            if (--job->active == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    int count_ = 0;
};

// fn(begin, end) for consecutive pieces of [0, n), each of `grain` (the last one shorter), on up to `threads`
// threads (0: as many as the process has CPUs). Returns when all are done; an exception of `fn` (that of the
// first piece in order, where several throw) is thrown here after that.
template <class F>
void parallel_for(int64_t n, int64_t grain, int threads, F&& fn) {
    if (n <= 0) return;
    grain = std::max<int64_t>(1, grain);
    const int64_t chunks = (n + grain - 1) / grain;
    const int64_t most = std::min<int64_t>(chunks, threads > 0 ? threads : chunks > 1 ? allowed_cpus() : 1);
    if (most <= 1) {
        for (int64_t i = 0; i < chunks; i++) fn(i * grain, std::min(n, (i + 1) * grain));
        return;
    }
    using Fn = std::remove_reference_t<F>;
    Pool::Job job;
    job.call = [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); };
    job.context = const_cast<void*>(static_cast<const void*>(&fn));
    job.n = n;
    job.grain = grain;
    job.chunks = chunks;
    job.wanted = int(std::min<int64_t>(most - 1, Pool::kMost));
    Pool::get().run(job);
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace edgekit
