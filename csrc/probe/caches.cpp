#include "probe/caches.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace setpoint {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "32768K" or "32M"; 0 when it is neither.
size_t size_of(const std::string& text) {
  std::istringstream stream(text);
  size_t size = 0;
  char unit = 0;
  if (!(stream >> size >> unit) || size > (size_t(1) << 30)) return 0;
  return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : 0;
}

// CPUs in "0-3,8-11".
int cpus_of(const std::string& list) {
  std::istringstream parts(list);
  int cpus = 0;
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream range(part);
    int first = 0, last = 0;
    char dash = 0;
    if (!(range >> first)) return 1;
    if (!(range >> dash >> last)) last = first;
    cpus += std::clamp(last - first + 1, 0, 1 << 16);
  }
  return std::max(cpus, 1);
}

size_t known(long bytes) { return bytes > 0 ? size_t(bytes) : 0; }

}  // namespace

Caches read_caches() {
  Caches caches;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  caches.l1_bytes = known(sysconf(_SC_LEVEL1_DCACHE_SIZE));
  caches.l2_bytes = known(sysconf(_SC_LEVEL2_CACHE_SIZE));
  caches.l3_bytes = known(sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
  for (int index = 0; index < 8; ++index) {  // sysfs knows better, above all who shares
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(folder + "level");
    const size_t bytes = size_of(first_line(folder + "size"));
    if (level.empty() || bytes == 0 || first_line(folder + "type") == "Instruction") continue;
    if (level == "1") caches.l1_bytes = bytes;
    if (level == "2") caches.l2_bytes = bytes;
    if (level != "3") continue;
    caches.l3_bytes = bytes;
    caches.l3_cpus = cpus_of(first_line(folder + "shared_cpu_list"));
  }
  return caches;
}

}  // namespace setpoint
