// The probes of csrc/probe: what the machine can do at most.
#include "bindings/bindings.h"
#include "probe/cpu_times.h"
#include "probe/probe.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

Peak peak_of(const std::string& name) {
  if (name == "int8") return Peak::int8;
  if (name == "int16") return Peak::int16;
  if (name == "bf16") return Peak::bf16;
  if (name == "fp32") return Peak::fp32;
  throw std::invalid_argument("unknown peak '" + name + "'; one of int8, int16, bf16, fp32");
}

nb::dict caches(const Probe& probe) {
  nb::dict sizes;
  sizes["l1_bytes"] = probe.caches().l1_bytes;
  sizes["l2_bytes"] = probe.caches().l2_bytes;
  sizes["l3_bytes"] = probe.caches().l3_bytes;
  sizes["l3_cpus"] = probe.caches().l3_cpus;
  return sizes;
}

nb::dict cpu_times_dict() {
  const CpuTimes times = cpu_times();
  nb::dict seconds;
  seconds["total_s"] = times.total_s;
  seconds["busy_s"] = times.busy_s;
  seconds["steal_s"] = times.steal_s;
  seconds["own_s"] = times.own_s;
  return seconds;
}

}  // namespace

void bind_probe(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def("cpu_times", &cpu_times_dict, "Seconds of all CPUs together since the machine started, and of this process.");
  nb::class_<Probe>(m, "Probe", "Short measurements of the machine with pinned threads, without the GIL; see csrc/probe/probe.h.")
      .def(nb::init<>())
      .def(
          "peak", [](Probe& p, const std::string& kind, int threads, double seconds) { return p.peak(peak_of(kind), threads, seconds); },
          "kind"_a, "threads"_a, "seconds"_a, Release(),
          "1e9 operations a second of int8, int16, bf16 or fp32; None when the CPU lacks the instruction.")
      .def("read", &Probe::read, "threads"_a, "bytes_per_thread"_a, "seconds"_a, Release(), "GB/s from whichever cache holds the bytes.")
      .def("dram", &Probe::dram, "threads"_a, "seconds"_a, Release(), "GB/s from memory.")
      .def(
          "barrier",
          [](Probe& p, int threads, double seconds) {
            const BarrierCost cost = p.barrier(threads, seconds);
            return std::pair(cost.median_us, cost.p99_us);
          },
          "threads"_a, "seconds"_a, Release(), "Median and 99th percentile of a barrier, in microseconds.")
      .def_prop_ro("caches", &caches)
      .def_prop_ro("buffer_bytes", &Probe::buffer_bytes);
}

}  // namespace setpoint
