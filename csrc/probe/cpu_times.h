// Who used the CPUs, since the machine started: differences of two readings tell how quiet a measurement was.
#pragma once

namespace setpoint {

// Seconds summed over all CPUs; all zero where the operating system does not tell.
struct CpuTimes {
  double total_s = 0;
  double busy_s = 0;   // anybody's work, ours included
  double steal_s = 0;  // the hypervisor ran somebody else
  double own_s = 0;    // this process
};

CpuTimes cpu_times();

}  // namespace setpoint
