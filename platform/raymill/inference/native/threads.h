// The threads of a step: one call wakes them, a barrier holds them together, and between steps they sleep.
//
// Waiting is spinning for 20 us, then giving way to whoever wants the core, then (between steps only, after 0.5 ms)
// sleeping: a decode step has some fifty barriers of well under a microsecond, and the next step follows the last
// closely while there is work; a replica without any burns nothing.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace raymill {

inline void pause_core() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Threads {
   public:
    // std::system_error where the machine has no more threads.
    explicit Threads(int count) : count_(count) {
        try {
            for (int number = 1; number < count; ++number) workers_.emplace_back([this, number] { serve(number); });
        } catch (...) {
            end();
            throw;
        }
    }

    ~Threads() { end(); }

    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    int count() const { return count_; }

    // Runs function(number) on every thread, the caller being number 0; returns when all are done.
    template <class Function>
    void run(const Function& function) {
        context_ = &function;
        work_ = [](const void* context, int number) { (*static_cast<const Function*>(context))(number); };
        if (count_ > 1) start();
        function(0);
        barrier();
    }

    // Waits until all threads are here; what each wrote before it, all see after it.
    void barrier() {
        if (count_ == 1) return;
        const unsigned turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
            spins < kSpins ? pause_core() : static_cast<void>(sched_yield());
    }

   private:
    static constexpr int kSpins = 1000;  // about 20 us
    static constexpr std::chrono::microseconds kAwake{500};

    void end() {
        work_ = nullptr;
        start();
        for (std::thread& worker : workers_) worker.join();
    }

    void start() {
        step_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst) == 0) return;
        { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever counted itself asleep now waits
        wake_.notify_all();
    }

    void serve(int number) {
        for (unsigned done = 0;;) {
            wait_for_step(done);
            ++done;
            if (!work_) return;
            work_(context_, number);
            barrier();
        }
    }

    void wait_for_step(unsigned done) {
        const auto awake_until = std::chrono::steady_clock::now() + kAwake;
        for (int spins = 0; step_.load(std::memory_order_acquire) == done; ++spins) {
            if (spins < kSpins) {
                pause_core();
                continue;
            }
            sched_yield();
            if (std::chrono::steady_clock::now() < awake_until) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return step_.load(std::memory_order_seq_cst) != done; });
            asleep_.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    const int count_;
    std::vector<std::thread> workers_;
    const void* context_ = nullptr;
    void (*work_)(const void*, int) = nullptr;
    alignas(64) std::atomic<unsigned> step_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> turn_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace raymill
