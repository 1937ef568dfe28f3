// Persistent threads for a step: the caller and its workers run one function
// together, meeting at barriers.
//
// Waiting spins (loads and `pause`) for some tens of microseconds and then
// sleeps in the kernel: a barrier inside a step costs well under a microsecond,
// an idle engine costs nothing. Every thread has a CPU of its own for the
// length of a run, the caller too: threads that sleep often look idle, and a
// kernel may pack them onto one CPU.
#pragma once
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace setpoint {

class ThreadPool {
 public:
  // No thread starts before the first run, so a process may still fork; after
  // it, a forked child cannot run (its threads are gone) and is told so by
  // std::runtime_error. Throws std::invalid_argument below 1.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Calls fn(thread) for every thread in [0, size()), 0 being the caller, and
  // returns when all have finished. The first exception breaks the barriers of
  // the others and is rethrown here. One caller at a time.
  template <class F>
  void run(F&& fn) {
    using Function = std::remove_reference_t<F>;
    run_task([](void* context, int thread) { (*static_cast<Function*>(context))(thread); },
             const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Inside run only: returns when every thread has arrived. Writes before it
  // are visible after it.
  void barrier() {
    barrier([] { return false; });
  }
  // While it waits, a thread calls idle() again and again until that returns
  // false; it should do some 100 ns of work at a time.
  template <class F>
  void barrier(F&& idle) {
    if (num_threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrive()) return;
    while (phase_.load(std::memory_order_acquire) == phase && idle()) {
    }
    wait_for_phase_after(phase);
  }

 private:
  using Task = void (*)(void* context, int thread);
  struct Broken {};  // thrown out of barrier() after another thread has failed

  void run_task(Task task, void* context);
  void start_workers();
  void work(int thread);
  void call(int thread) noexcept;
  void wait_while(std::atomic<int>& word, int value);
  bool arrive();  // true for the last thread, which frees the others
  void wait_for_phase_after(int phase);

  const int num_threads_;
  const std::vector<int> cpus_;  // one a thread; empty with more threads than
                                 // CPUs: then nobody is pinned or spins
  std::vector<std::thread> workers_;
  int process_ = 0;  // whose threads the workers are
  Task task_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  // Each word that threads spin on has a cache line of its own.
  alignas(64) std::atomic<int> generation_{0};  // counts runs; workers wait for it to change
  alignas(64) std::atomic<int> busy_{0};        // workers still inside the current run
  alignas(64) std::atomic<int> arrived_{0};     // threads at the current barrier
  alignas(64) std::atomic<int> phase_{0};       // counts barriers passed
  alignas(64) std::atomic<bool> failed_{false};
};

}  // namespace setpoint
