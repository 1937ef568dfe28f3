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
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/team_size.h"

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
    open(num_threads_, num_threads_, [&fn](int thread) { fn(thread); });
  }

  // Calls fn(stage, thread) for the stages [0, stages) in order, with a barrier
  // after each, on a team that begins as whoever is there. A thread whose CPU
  // does something else is not waited for: it joins the team between two
  // stages, and is left out for a while when the others wait for it too long.
  // Members have the numbers [0, team()). While a thread waits between
  // stages it calls idle(thread), as in barrier().
  template <class F, class Idle>
  void run_stages(int stages, F&& fn, Idle&& idle) {
    open(1, patient_ ? num_threads_ : team_size_.size(), [&](int thread) {
      if (!admitted(thread)) return;
      for (int stage = stage_; stage < stages;) {
        fn(stage, thread);
        if (++stage < stages) meet(stage, [&] { return idle(thread); });
      }
    });
  }

  // Whether run_stages waits for everybody before its first stage. For tests.
  void set_patient(bool on) { patient_ = on; }
  // Inside run and run_stages only: the threads that share the work.
  int team() const { return team_; }

  // Inside run only: returns when every thread has arrived. Writes before it
  // are visible after it.
  void barrier() {
    barrier([] { return false; });
  }
  // While it waits, a thread calls idle() again and again until that returns
  // false; it should do some 100 ns of work at a time.
  template <class F>
  void barrier(F&& idle) {
    meet(-1, std::forward<F>(idle));
  }

 private:
  using Task = void (*)(void* context, int thread);
  struct Broken {};  // thrown out of a barrier after another thread has failed

  template <class F>
  void open(int team, int most, F&& fn) {
    run_task([](void* context, int thread) { (*static_cast<std::remove_reference_t<F>*>(context))(thread); }, &fn, team, most);
  }
  // A barrier; when `next_stage` is not negative, threads that came late start there.
  template <class F>
  void meet(int next_stage, F&& idle) {
    if (num_threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrive(next_stage)) return;
    while (phase_.load(std::memory_order_acquire) == phase && idle()) {
    }
    wait_for_phase_after(phase);
  }

  void run_task(Task task, void* context, int team, int most);
  void start_workers();
  void work(int cpu);         // index into cpus_
  int enter(int generation);  // the thread's number in this run, or 0 when it is over
  bool admitted(int thread);  // waits until the thread is in the team; false when the run ends first
  void admit(int stage);
  void next_phase();
  void wait_for_leavers(int number);
  void call(int thread) noexcept;
  bool spins_while(std::atomic<int>& word, int value) const;
  void wait_while(std::atomic<int>& word, int value);
  void wait_for_member(std::atomic<int>& word, int value);  // counts as stalled what it sleeps
  bool arrive(int next_stage);                              // true for the last thread, which frees the others
  void wait_for_phase_after(int phase);

  const int num_threads_;
  const std::vector<int> cpus_;  // one a thread; empty with more threads than
                                 // CPUs: then nobody is pinned or spins
  std::vector<std::thread> workers_;
  int process_ = 0;  // whose threads the workers are
  Task task_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
  bool patient_ = false;
  int stage_ = 0;  // where the team goes on; changed while it waits
  int team_ = 1;
  int most_ = 1;  // members of this run's team
  TeamSize team_size_;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;

  // Each word that threads spin on has a cache line of its own.
  alignas(64) std::atomic<int> generation_{0};      // counts runs; workers wait for it to change
  alignas(64) std::atomic<uint64_t> door_{0};       // generation << 32 | closed | workers that entered
  alignas(64) std::atomic<int> left_{0};            // workers that entered this run and have finished
  alignas(64) std::atomic<int> arrived_{0};         // threads at the current barrier
  alignas(64) std::atomic<int> phase_{0};           // counts barriers passed
  alignas(64) std::atomic<int> admitted_{1};        // team_, for those who wait to be in it
  alignas(64) std::atomic<int64_t> stalled_ns_{0};  // of all threads in this run
  alignas(64) std::atomic<bool> failed_{false};
  alignas(64) std::atomic<bool> ended_{false};  // whoever still waits to be admitted may go
};

}  // namespace setpoint
