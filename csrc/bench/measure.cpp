#include "bench/measure.h"

#include <algorithm>
#include <chrono>

namespace setpoint::bench {
namespace {

constexpr int kSlices = 5;
constexpr int kMostRepetitions = 4096;  // of a slice

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[size_t(q * double(values.size() - 1) + 0.5)];
}

}  // namespace

// Seconds that the repetitions take after `leading` others, which bring back what a probe has driven out of the caches.
double Stopwatch::run(Workload& workload, int leading, int repetitions) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin, end;
  workload.prepare(leading + repetitions, pool_.size());
  pool_.run([&](int thread) {
    pool_.barrier();
    for (int i = 0; i < leading + repetitions; ++i) {
      if (thread == 0 && i == leading) begin = Clock::now();
      workload.run(i, thread);
      pool_.barrier();
    }
    if (thread == 0) end = Clock::now();
  });
  return std::chrono::duration<double>(end - begin).count();
}

Stopwatch::Ceilings Stopwatch::ceilings(const Work& work) {
  const double seconds = seconds_ / (4 * kSlices);  // a slice takes as long as the two probes at one of its ends
  Ceilings now;
  if (work.operations > 0) now.gops = probe_.peak(work.peak, pool_.size(), seconds).value_or(0);
  now.gb_s = work.bytes_per_thread == 0 ? probe_.dram(pool_.size(), seconds) : probe_.read(pool_.size(), work.bytes_per_thread, seconds);
  return now;
}

Timing Stopwatch::time(Workload& workload) {
  const Work work = workload.work();
  const bool warm = work.bytes_per_thread > 0;
  const double once = run(workload, 1, 1);
  const int repetitions = int(std::clamp(seconds_ / (2 * kSlices) / once, 1., double(kMostRepetitions)));
  std::vector<double> seconds, shares, compute, memory, gops, gb_s;
  Ceilings before = ceilings(work);
  for (int slice = 0; slice < kSlices; ++slice) {
    const double taken = run(workload, warm ? 1 : 0, repetitions) / repetitions;
    const Ceilings after = ceilings(work);
    gops.push_back((before.gops + after.gops) / 2);
    gb_s.push_back((before.gb_s + after.gb_s) / 2);
    seconds.push_back(taken);
    compute.push_back(gops.back() > 0 ? 1e-9 * work.operations / taken / gops.back() : 0);
    memory.push_back(1e-9 * work.bytes / taken / gb_s.back());
    shares.push_back(std::max(compute.back(), memory.back()));
    before = after;
  }
  return {quantile(seconds, .5), quantile(shares, .5),  quantile(shares, .1),
          quantile(shares, .9),  quantile(compute, .5), quantile(memory, .5),
          quantile(gops, .5),    quantile(gb_s, .5),    kSlices};
}

}  // namespace setpoint::bench
