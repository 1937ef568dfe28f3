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
constexpr auto kGathering = std::chrono::microseconds(3);  // for the others, before the first stage
constexpr uint64_t kClosed = uint64_t{1} << 31;

int entered(uint64_t door) { return static_cast<int>(door & (kClosed - 1)); }

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

ThreadPool::ThreadPool(int num_threads) : num_threads_(checked(num_threads)), cpus_(cpus_for(num_threads)), team_size_(num_threads) {}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::wait_while(std::atomic<int>& word, int value) {
  if (!spins_while(word, value))
    while (word.load(std::memory_order_acquire) == value) word.wait(value, std::memory_order_acquire);
}

void ThreadPool::wait_for_member(std::atomic<int>& word, int value) {
  if (spins_while(word, value)) return;
  const auto begin = std::chrono::steady_clock::now();
  while (word.load(std::memory_order_acquire) == value) word.wait(value, std::memory_order_acquire);
  stalled_ns_.fetch_add(std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count(), std::memory_order_relaxed);
}

// True when the word changed in time.
bool ThreadPool::spins_while(std::atomic<int>& word, int value) const {
  if (cpus_.empty()) return word.load(std::memory_order_acquire) != value;
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != value) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

void ThreadPool::start_workers() {
  process_ = getpid();
  workers_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int thread = static_cast<int>(workers_.size()) + 1; thread < num_threads_; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

void ThreadPool::work(int cpu) {
  if (!cpus_.empty()) pin_thread(cpus_[static_cast<size_t>(cpu)]);
  int seen = 0;  // workers start before the first run, while generation_ is still 0
  for (;;) {
    wait_while(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_) return;
    const int thread = enter(seen);
    if (thread == 0) continue;
    call(thread);
    left_.fetch_add(1, std::memory_order_acq_rel);
    left_.notify_one();
  }
}

int ThreadPool::enter(int generation) {
  uint64_t door = door_.load(std::memory_order_acquire);
  do {
    if (door >> 32 != static_cast<uint32_t>(generation) || (door & kClosed) != 0 || entered(door) + 1 >= most_) return 0;
  } while (!door_.compare_exchange_weak(door, door + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  return entered(door) + 1;
}

bool ThreadPool::admitted(int thread) {
  if (thread == 0) {  // the caller waits a moment: awake threads are here at once
    const auto deadline = std::chrono::steady_clock::now() + kGathering;
    while (entered(door_.load(std::memory_order_acquire)) < most_ - 1) {
      if (patient_)
        std::this_thread::yield();
      else if (std::chrono::steady_clock::now() < deadline)
        pause_cpu();
      else
        break;
    }
    admit(0);
    return true;
  }
  for (;;) {
    const int phase = phase_.load(std::memory_order_acquire);
    if (thread < admitted_.load(std::memory_order_acquire)) return true;
    if (failed_.load(std::memory_order_acquire)) throw Broken();
    if (ended_.load(std::memory_order_acquire)) return false;
    wait_while(phase_, phase);
  }
}

// Everybody who has entered belongs to the team from `stage` on. Only called where the whole team waits.
void ThreadPool::admit(int stage) {
  stage_ = stage;
  team_ = 1 + entered(door_.load(std::memory_order_acquire));
  admitted_.store(team_, std::memory_order_release);
  next_phase();
}

void ThreadPool::next_phase() {
  phase_.fetch_add(1, std::memory_order_release);
  phase_.notify_all();
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
    next_phase();  // frees whoever waits at a barrier
  }
}

void ThreadPool::run_task(Task task, void* context, int team, int most) {
  if (static_cast<int>(workers_.size()) + 1 < num_threads_) start_workers();
  if (num_threads_ > 1 && process_ != getpid())
    throw std::runtime_error("threads do not survive a fork; open the model in the process that uses it");
  const ScopedPin pin(cpus_.empty() || most == 1 ? -1 : cpus_[0]);  // a thread alone may evade its neighbours
  const auto begin = std::chrono::steady_clock::now();
  task_ = task;
  context_ = context;
  team_ = team;
  most_ = most;
  stalled_ns_.store(0, std::memory_order_relaxed);
  admitted_.store(team, std::memory_order_relaxed);
  left_.store(0, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  ended_.store(false, std::memory_order_relaxed);
  const int generation = generation_.load(std::memory_order_relaxed) + 1;
  door_.store(uint64_t{static_cast<uint32_t>(generation)} << 32, std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  call(0);
  if (team == num_threads_ && num_threads_ > 1) wait_for_leavers(num_threads_ - 1);  // everybody runs a plain task
  ended_.store(true, std::memory_order_release);
  const uint64_t door = door_.fetch_or(kClosed, std::memory_order_acq_rel);
  next_phase();
  wait_for_leavers(entered(door));
  if (team < num_threads_ && !cpus_.empty()) {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    team_size_.note(seconds.count(), 1e-9 * static_cast<double>(stalled_ns_.load(std::memory_order_relaxed)) / (num_threads_ - 1));
  }
  if (failed_.load(std::memory_order_acquire)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

void ThreadPool::wait_for_leavers(int number) {
  for (int left = left_.load(std::memory_order_acquire); left != number; left = left_.load(std::memory_order_acquire))
    wait_while(left_, left);
}

bool ThreadPool::arrive(int next_stage) {
  if (failed_.load(std::memory_order_acquire)) throw Broken();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) != team_ - 1) return false;
  arrived_.store(0, std::memory_order_relaxed);
  if (next_stage < 0)
    next_phase();
  else
    admit(next_stage);
  if (failed_.load(std::memory_order_acquire)) throw Broken();
  return true;
}

void ThreadPool::wait_for_phase_after(int phase) {
  wait_for_member(phase_, phase);
  if (failed_.load(std::memory_order_acquire)) throw Broken();
}

}  // namespace setpoint
