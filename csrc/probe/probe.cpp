#include "probe/probe.h"

#include "core/affinity.h"
#include "probe/loops.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace setpoint {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kPage = 4096;
constexpr size_t kReadQuantum = size_t{1} << 20;  // between two looks at the clock, some 20 us
constexpr int64_t kPeakRounds = 20000;            // likewise

int usable_cpus() {
  const size_t allowed = allowed_cpus().size();
  return allowed > 0 ? int(allowed) : std::max(1, int(std::thread::hardware_concurrency()));
}

// Several times all last-level caches, within a quarter of the memory that is free.
size_t buffer_size(const Caches& caches) {
  const size_t instances = size_t((usable_cpus() + caches.l3_cpus - 1) / caches.l3_cpus);
  const size_t wanted = std::clamp(6 * instances * caches.l3_bytes, size_t{256} << 20, size_t{2} << 30);
  const long pages = sysconf(_SC_AVPHYS_PAGES);
  const size_t most = pages > 0 ? std::max(size_t(pages) / 4 * size_t(sysconf(_SC_PAGESIZE)), size_t{32} << 20) : wanted;
  return std::min(wanted, most) / kPage * kPage;
}

// Every thread repeats `work(thread)`, which returns an amount, until the time is over; the sum of the threads' rates.
template <class Work>
double rate_of(ThreadPool& pool, double seconds, Work work) {
  struct alignas(64) Lane {
    double rate = 0;
  };
  std::vector<Lane> lanes(size_t(pool.size()));
  pool.run([&](int thread) {
    pool.barrier();
    const auto begin = Clock::now(), deadline = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    double amount = 0;
    auto now = begin;
    do {
      amount += work(thread);
      now = Clock::now();
    } while (now < deadline);
    lanes[size_t(thread)].rate = amount / std::chrono::duration<double>(now - begin).count();
  });
  double sum = 0;
  for (const Lane& lane : lanes) sum += lane.rate;
  return sum;
}

const PeakLoop& loop_of(Peak kind) {
  const ProbeLoops& loops = probe_loops();
  switch (kind) {
    case Peak::int8:
      return loops.int8;
    case Peak::int16:
      return loops.int16;
    case Peak::bf16:
      return loops.bf16;
    default:
      return loops.fp32;
  }
}

}  // namespace

Probe::Probe() : caches_(read_caches()), buffer_bytes_(buffer_size(caches_)) {}

ThreadPool& Probe::pool(int threads, double seconds) {
  if (threads < 1 || threads > usable_cpus())
    throw std::invalid_argument("a probe runs with 1 to " + std::to_string(usable_cpus()) + " threads, one a CPU");
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("a probe takes more than 0 and at most 60 seconds");
  return pools_.try_emplace(threads, threads).first->second;
}

// Written once, so that it lies in memory of its own and not in one shared page of zeros.
void Probe::touch_buffer(ThreadPool& pool) {
  if (buffer_.size() > 0) return;
  buffer_ = MappedArray<uint8_t>(buffer_bytes_);
  pool.run([&](int thread) {
    const size_t pages = buffer_bytes_ / kPage, begin = pages * size_t(thread) / size_t(pool.size());
    const size_t end = pages * size_t(thread + 1) / size_t(pool.size());
    for (size_t page = begin; page < end; ++page) buffer_[page * kPage] = 1;
  });
}

std::optional<double> Probe::peak(Peak kind, int threads, double seconds) {
  const std::lock_guard lock(mutex_);
  const PeakLoop& loop = loop_of(kind);
  ThreadPool& group = pool(threads, seconds);
  if (loop.run == nullptr) return std::nullopt;
  return 1e-9 * rate_of(group, seconds, [&](int) {
           loop.run(kPeakRounds);
           return double(kPeakRounds) * loop.operations_per_round;
         });
}

double Probe::read(int threads, size_t bytes_per_thread, double seconds) {
  const std::lock_guard lock(mutex_);
  ThreadPool& group = pool(threads, seconds);
  touch_buffer(group);
  const size_t share = buffer_bytes_ / size_t(threads) / kPage * kPage;
  const size_t bytes = std::clamp(bytes_per_thread / kPage * kPage, kPage, share);
  const size_t passes = std::max<size_t>(1, kReadQuantum / bytes);
  return 1e-9 * rate_of(group, seconds, [&](int thread) {
           for (size_t pass = 0; pass < passes; ++pass) probe_loops().read(buffer_.data() + size_t(thread) * share, bytes);
           return double(passes * bytes);
         });
}

double Probe::dram(int threads, double seconds) {
  const std::lock_guard lock(mutex_);
  ThreadPool& group = pool(threads, seconds);
  touch_buffer(group);
  const size_t share = buffer_bytes_ / size_t(threads) / kPage * kPage, quantum = std::min(kReadQuantum, share);
  positions_.resize(std::max(positions_.size(), size_t(threads)));
  return 1e-9 * rate_of(group, seconds, [&](int thread) {
           size_t& at = positions_[size_t(thread)];
           if (at + quantum > share) at = 0;
           probe_loops().read(buffer_.data() + size_t(thread) * share + at, quantum);
           at += quantum;
           return double(quantum);
         });
}

BarrierCost Probe::barrier(int threads, double seconds) {
  constexpr size_t kMostSamples = 200'000;
  const std::lock_guard lock(mutex_);
  ThreadPool& group = pool(threads, seconds);
  std::vector<float> samples;
  samples.reserve(kMostSamples);
  bool more = true;  // written by thread 0 between two barriers
  group.run([&](int thread) {
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    while (more) {
      group.barrier();  // everybody is here
      const auto before = Clock::now();
      group.barrier();
      const auto after = Clock::now();
      if (thread == 0) {
        samples.push_back(std::chrono::duration<float, std::micro>(after - before).count());
        more = samples.size() < kMostSamples && after < deadline;
      }
      group.barrier();
    }
  });
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples[samples.size() - 1 - samples.size() / 100]};
}

}  // namespace setpoint
