// Which CPUs a thread runs on. Without operating system support everything here
// does nothing.
#pragma once
#include <vector>

namespace setpoint {

// CPUs that the calling thread may use, ascending; empty where that is unknown.
std::vector<int> allowed_cpus();

// Keeps the calling thread on one CPU for good.
void pin_thread(int cpu);

// Keeps the calling thread on one CPU for a while, then gives it back the CPUs
// it had. cpu -1 = leave it alone.
class ScopedPin {
 public:
  explicit ScopedPin(int cpu);
  ~ScopedPin();
  ScopedPin(const ScopedPin&) = delete;
  ScopedPin& operator=(const ScopedPin&) = delete;

 private:
  bool pinned_ = false;
  alignas(8) unsigned char saved_[128] = {};  // a cpu_set_t
};

}  // namespace setpoint
