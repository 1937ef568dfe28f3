#include "probe/cpu_times.h"

#include <time.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace setpoint {

CpuTimes cpu_times() {
  CpuTimes times;
  std::ifstream file("/proc/stat");
  std::string name;
  double user = 0, nice = 0, system = 0, idle = 0, wait = 0, hardware = 0, software = 0, steal = 0;
  if (!(file >> name >> user >> nice >> system >> idle >> wait >> hardware >> software >> steal) || name != "cpu") return times;
  const double tick = 1. / double(sysconf(_SC_CLK_TCK));
  const double busy = user + nice + system + hardware + software;
  times.total_s = (busy + idle + wait + steal) * tick;
  times.busy_s = busy * tick;
  times.steal_s = steal * tick;
  timespec own{};
  if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own) == 0) times.own_s = double(own.tv_sec) + 1e-9 * double(own.tv_nsec);
  return times;
}

}  // namespace setpoint
