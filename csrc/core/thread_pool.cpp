#include "core/thread_pool.h"

#include "core/affinity.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace setpoint {

namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The first `num_threads` CPUs, or none when there are not as many.
std::vector<int> cpus_for(int num_threads) {
  std::vector<int> cpus = allowed_cpus();
  cpus.resize(static_cast<size_t>(num_threads) <= cpus.size() ? static_cast<size_t>(num_threads) : 0);
  return cpus;
}

int checked(int num_threads) {
  if (num_threads < 1 || num_threads > 1024) throw std::invalid_argument("num_threads must lie in [1, 1024]");
  return num_threads;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(checked(num_threads)), cpus_(cpus_for(num_threads)) {}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::wait_while(std::atomic<int>& word, int value) {
  if (!cpus_.empty()) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (word.load(std::memory_order_acquire) != value) return;
        pause_cpu();
      }
    } while (std::chrono::steady_clock::now() < deadline);
  }
  while (word.load(std::memory_order_acquire) == value) word.wait(value, std::memory_order_acquire);
}

void ThreadPool::start_workers() {
  process_ = getpid();
  workers_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int thread = static_cast<int>(workers_.size()) + 1; thread < num_threads_; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

void ThreadPool::work(int thread) {
  if (!cpus_.empty()) pin_thread(cpus_[static_cast<size_t>(thread)]);
  int seen = 0;  // workers start before the first run, while generation_ is still 0
  for (;;) {
    wait_while(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_) return;
    call(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

void ThreadPool::call(int thread) noexcept {
  try {
    task_(context_, thread);
  } catch (const Broken&) {
    // The thread that failed has stored its exception.
  } catch (...) {
    {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    failed_.store(true, std::memory_order_release);
    phase_.fetch_add(1, std::memory_order_release);  // frees whoever waits at a barrier
    phase_.notify_all();
  }
}

void ThreadPool::run_task(Task task, void* context) {
  if (static_cast<int>(workers_.size()) + 1 < num_threads_) start_workers();
  if (num_threads_ > 1 && process_ != getpid())
    throw std::runtime_error("threads do not survive a fork; open the model in the process that uses it");
  const ScopedPin pin(cpus_.empty() || num_threads_ == 1 ? -1 : cpus_[0]);
  task_ = task;
  context_ = context;
  busy_.store(num_threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  call(0);
  for (int left = busy_.load(std::memory_order_acquire); left != 0; left = busy_.load(std::memory_order_acquire)) wait_while(busy_, left);
  if (failed_.load(std::memory_order_acquire)) {
    failed_.store(false, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

bool ThreadPool::arrive() {
  if (failed_.load(std::memory_order_acquire)) throw Broken();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) != num_threads_ - 1) return false;
  arrived_.store(0, std::memory_order_relaxed);
  phase_.fetch_add(1, std::memory_order_release);
  phase_.notify_all();
  if (failed_.load(std::memory_order_acquire)) throw Broken();
  return true;
}

void ThreadPool::wait_for_phase_after(int phase) {
  wait_while(phase_, phase);
  if (failed_.load(std::memory_order_acquire)) throw Broken();
}

}  // namespace setpoint
