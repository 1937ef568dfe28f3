// The data caches one CPU sees. Zero where the operating system does not tell.
#pragma once
#include <cstddef>

namespace setpoint {

struct Caches {
  size_t l1_bytes = 0, l2_bytes = 0, l3_bytes = 0;
  int l3_cpus = 1;  // CPUs that share one L3
};

Caches read_caches();

}  // namespace setpoint
