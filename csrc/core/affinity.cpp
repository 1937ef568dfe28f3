#include "core/affinity.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace setpoint {

#if defined(__linux__)

namespace {

bool set_affinity(const cpu_set_t& cpus) { return pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus) == 0; }

cpu_set_t only(int cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  return cpus;
}

}  // namespace

std::vector<int> allowed_cpus() {
  cpu_set_t allowed;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  return cpus;
}

void pin_thread(int cpu) { set_affinity(only(cpu)); }

ScopedPin::ScopedPin(int cpu) {
  static_assert(sizeof(cpu_set_t) <= sizeof saved_);
  if (cpu < 0) return;
  auto* saved = reinterpret_cast<cpu_set_t*>(saved_);
  pinned_ = pthread_getaffinity_np(pthread_self(), sizeof *saved, saved) == 0 && set_affinity(only(cpu));
}

ScopedPin::~ScopedPin() {
  if (pinned_) set_affinity(*reinterpret_cast<const cpu_set_t*>(saved_));
}

#else

std::vector<int> allowed_cpus() { return {}; }
void pin_thread(int) {}
ScopedPin::ScopedPin(int) {}
ScopedPin::~ScopedPin() = default;

#endif

}  // namespace setpoint
