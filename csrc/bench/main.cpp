// The kernel workshop: every op, shape and variant against the reference and against the machine.
//
//   kernel_bench [--filter TERMS] [--threads N] [--seconds S] [--check] [--list] [--json]
#include "bench/measure.h"
#include "bench/workload.h"
#include "kernels/kernels.h"
#include "probe/cpu_times.h"

#include <fnmatch.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "core/affinity.h"

namespace setpoint::bench {

bool is_best_isa(const char* isa) { return std::strcmp(isa, kernel_table("auto").isa) == 0; }

namespace {

constexpr const char* kUsage =
    "usage: kernel_bench [--filter TERMS] [--threads N] [--seconds S] [--check] [--list] [--json]\n"
    "\n"
    "  --filter TERMS  run the cases whose name has, for every term, a segment like it (* and ? as in a shell), from all\n"
    "                  cases instead of the standard set; terms are separated by spaces or commas.\n"
    "                  Reference variants only when a term names them. Example: --filter 'matmul Q4_* smollm2* m8 cold'\n"
    "  --threads N     default: one per CPU\n"
    "  --seconds S     for each case, probes included (default 0.2)\n"
    "  --check         compare with the reference only, no timing\n"
    "  --list          print the names only\n"
    "  --json          one JSON document instead of the table\n"
    "\n"
    "A line: microseconds of one repetition, ended by a barrier; its rates; its share of the ceiling that binds it, which\n"
    "was measured just before and after each slice (median, lowest and highest slice), and that ceiling: GOP/s of the\n"
    "arithmetic, or GB/s of the memory or cache that the bytes come from. cold: from memory. Numbers taken while other\n"
    "processes use more than a tenth of the CPUs say little: a barrier waits for the thread that is off its CPU.\n";

struct Options {
  std::vector<std::string> terms;
  int threads = 0;
  double seconds = 0.2;
  bool check = false, list = false, json = false;
};

std::vector<std::string> split(std::string text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);)
    if (!part.empty()) parts.push_back(part);
  return parts;
}

double number_of(const std::string& flag, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') throw std::invalid_argument(flag + " is not a number: " + text);
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string flag = arguments[i];
    const auto value = [&] {
      if (++i == count) throw std::invalid_argument(flag + " needs a value");
      return std::string(arguments[i]);
    };
    if (flag == "--filter") {
      std::string terms = value();
      for (char& c : terms) c = c == ',' ? ' ' : c;
      for (const std::string& term : split(terms, ' ')) options.terms.push_back(term);
    } else if (flag == "--threads") {
      const double threads = number_of(flag, value());
      if (!(threads >= 1 && threads <= 1 << 16)) throw std::invalid_argument("--threads must lie in [1, CPUs]");
      options.threads = int(threads);
    } else if (flag == "--seconds") {
      options.seconds = number_of(flag, value());
    } else if (flag == "--check") {
      options.check = true;
    } else if (flag == "--list") {
      options.list = true;
    } else if (flag == "--json") {
      options.json = true;
    } else {
      throw std::invalid_argument("unknown argument " + flag);
    }
  }
  if (!(options.seconds > 0 && options.seconds <= 60)) throw std::invalid_argument("--seconds must lie in (0, 60]");
  const int cpus = std::max(1, int(allowed_cpus().size()));
  if (options.threads == 0) options.threads = cpus;
  if (options.threads > cpus) throw std::invalid_argument("--threads must lie in [1, CPUs]");
  return options;
}

bool selected(const Case& c, const Options& options) {
  if (options.terms.empty()) return c.standard;
  bool reference = is_best_isa("ref");  // where there is nothing else
  const std::vector<std::string> segments = split(c.name, '/');
  for (const std::string& term : options.terms) {
    bool found = false;
    for (const std::string& segment : segments) found |= fnmatch(term.c_str(), segment.c_str(), 0) == 0;
    if (!found) return false;
    reference |= term == "ref";
  }
  return reference || c.name.find("/ref/") == std::string::npos;
}

void print_row(const Case& c, const Work& work, const Timing& t, const Options& options, bool first) {
  const double gops = 1e-9 * work.operations / t.seconds, gb_s = 1e-9 * work.bytes / t.seconds;
  const char* memory = work.bytes_per_thread == 0 ? "memory" : "cache";
  if (options.json) {
    std::printf(
        "%s{\"case\": \"%s\", \"us\": %.3f, \"gops\": %.2f, \"gb_s\": %.3f, \"share\": %.4f, \"share_p10\": %.4f, "
        "\"share_p90\": %.4f, \"bound\": \"%s\", \"ceiling_gops\": %.1f, \"ceiling_gb_s\": %.2f}",
        first ? "" : ",\n", c.name.c_str(), t.seconds * 1e6, gops, gb_s, t.share, t.share_low, t.share_high,
        t.compute_bound() ? "compute" : memory, t.peak_gops, t.bandwidth_gb_s);
    return;
  }
  std::printf("%-62s %10.1f us ", c.name.c_str(), t.seconds * 1e6);
  if (work.operations > 0)
    std::printf("%8.1f GOP/s ", gops);
  else
    std::printf("%14s ", "");
  std::printf("%7.2f GB/s %4.0f %% (%.0f-%.0f) of %s %.0f\n", gb_s, t.share * 100, t.share_low * 100, t.share_high * 100,
              t.compute_bound() ? "compute" : memory, t.compute_bound() ? t.peak_gops : t.bandwidth_gb_s);
  std::fflush(stdout);
}

Cases all_cases(const Caches& caches) {
  const size_t cold_bytes = std::clamp(8 * caches.l3_bytes, size_t{64} << 20, size_t{1} << 30);
  Cases cases;
  add_matmul_cases(cases, cold_bytes);
  add_attention_cases(cases, cold_bytes);
  add_row_cases(cases);
  add_sample_cases(cases);
  return cases;
}

int run(const Options& options) {
  Probe probe;
  const Cases cases = all_cases(probe.caches());
  Stopwatch stopwatch(probe, options.threads, options.seconds);
  const CpuTimes begin = cpu_times();
  int count = 0, wrong = 0;
  if (options.json && !options.list)
    std::printf("{\"isa\": \"%s\", \"threads\": %d, \"rows\": [\n", kernel_table("auto").isa, options.threads);
  for (const Case& c : cases) {
    if (!selected(c, options)) continue;
    if (options.list) {
      std::puts(c.name.c_str());
      continue;
    }
    const std::unique_ptr<Workload> workload = c.make(options.threads);
    stopwatch.run_once(*workload);
    if (!workload->matches_reference()) {
      std::fprintf(stderr, "WRONG: %s differs from the reference\n", c.name.c_str());
      ++wrong;
    }
    if (!options.check) print_row(c, workload->work(), stopwatch.time(*workload), options, count == 0);
    ++count;
  }
  if (options.list) return 0;
  const CpuTimes end = cpu_times();
  const double total = std::max(end.total_s - begin.total_s, 1e-9);
  const double steal = (end.steal_s - begin.steal_s) / total;
  const double others = std::max(0., end.busy_s - begin.busy_s - (end.own_s - begin.own_s)) / total;
  if (options.json)
    std::printf("\n], \"cases\": %d, \"wrong\": %d, \"steal\": %.4f, \"others\": %.4f}\n", count, wrong, steal, others);
  else
    std::printf("%d cases, %d differ from the reference; of all CPU time %.1f %% stolen, %.1f %% used by other processes\n", count, wrong,
                steal * 100, others * 100);
  if (count == 0) std::fprintf(stderr, "kernel_bench: no case matches the filter; --list prints their names\n");
  return wrong > 0 || count == 0 ? 1 : 0;
}

}  // namespace
}  // namespace setpoint::bench

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i)
    if (std::strcmp(arguments[i], "--help") == 0 || std::strcmp(arguments[i], "-h") == 0) {
      std::fputs(setpoint::bench::kUsage, stdout);
      return 0;
    }
  try {
    return setpoint::bench::run(setpoint::bench::parse(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_bench: %s\n", error.what());
    return 2;
  }
}
