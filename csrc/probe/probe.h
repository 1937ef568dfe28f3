// What this machine can do at most, right now: short measurements with pinned threads, to stand beside a benchmark's
// own numbers. A shared machine changes its speed within minutes, so a number without a probe next to it says little.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "probe/caches.h"

namespace setpoint {

enum class Peak { int8, int16, bf16, fp32 };

struct BarrierCost {
  double median_us = 0, p99_us = 0;
};

// One measurement at a time; a second caller waits. Threads and the buffer are kept from one to the next.
class Probe {
 public:
  Probe();

  // 1e9 operations a second, all threads together; nothing when the CPU lacks the instruction.
  // This and the others throw std::invalid_argument for fewer than 1 thread, more than CPUs, or a time outside (0, 60] s.
  std::optional<double> peak(Peak kind, int threads, double seconds);
  // GB/s of a thread group in which each thread reads its own `bytes_per_thread` again and again: of a cache, where they
  // fit into it. At most what the buffer has.
  double read(int threads, size_t bytes_per_thread, double seconds);
  // GB/s from memory: a buffer several times as large as the last cache, each probe going on where the last one ended.
  double dram(int threads, double seconds);
  // A barrier of the thread pool in which everybody arrives at once.
  BarrierCost barrier(int threads, double seconds);

  const Caches& caches() const { return caches_; }
  size_t buffer_bytes() const { return buffer_bytes_; }

 private:
  ThreadPool& pool(int threads, double seconds);
  void touch_buffer(ThreadPool& pool);

  const Caches caches_;
  const size_t buffer_bytes_;
  std::mutex mutex_;
  std::map<int, ThreadPool> pools_;
  MappedArray<uint8_t> buffer_;
  std::vector<size_t> positions_;  // where each thread's next read from memory begins
};

}  // namespace setpoint
