// Timing beside probes: every slice of repetitions is compared with the ceilings measured just before and after it.
#pragma once
#include "bench/workload.h"
#include "core/thread_pool.h"

namespace setpoint::bench {

struct Timing {
  double seconds = 0;  // of one repetition: the median over the slices
  double share = 0;    // of what the ceilings allow, median over the slices; its 10th and 90th percentile:
  double share_low = 0, share_high = 0;
  double compute_share = 0;                  // operations against the compute peak alone; 0 when the CPU cannot measure it
  double memory_share = 0;                   // bytes against the bandwidth of where they come from, alone
  double peak_gops = 0, bandwidth_gb_s = 0;  // the ceilings, medians
  int slices = 0;
  bool compute_bound() const { return compute_share >= memory_share; }
};

class Stopwatch {
 public:
  Stopwatch(Probe& probe, int threads, double seconds) : probe_(probe), pool_(threads), seconds_(seconds) {}

  int threads() const { return pool_.size(); }
  // One repetition, not timed.
  void run_once(Workload& workload) { run(workload, 0, 1); }
  Timing time(Workload& workload);

 private:
  struct Ceilings {
    double gops = 0, gb_s = 0;
  };
  double run(Workload& workload, int leading, int repetitions);
  Ceilings ceilings(const Work& work);

  Probe& probe_;
  ThreadPool pool_;
  double seconds_;  // for all slices of a workload and the probes between them
};

}  // namespace setpoint::bench
