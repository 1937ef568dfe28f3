// One op on one shape with one kernel variant, ready to be run again and again; and the list of all of them.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "probe/probe.h"

namespace setpoint::bench {

// What one repetition has to do, whoever does it.
struct Work {
  double operations = 0;        // 0: moving bytes is all there is to it
  double bytes = 0;             // that have to be read or written
  Peak peak = Peak::fp32;       // which peak the operations compare with
  size_t bytes_per_thread = 0;  // working set that repetitions come back to; 0: it comes from memory
};

class Workload {
 public:
  virtual ~Workload() = default;
  virtual Work work() const = 0;
  // Before `repetitions` are run by `threads` threads; not timed.
  virtual void prepare(int repetitions, int threads) = 0;
  // This thread's part of repetition `index`. A barrier follows.
  virtual void run(int index, int thread) = 0;
  // After a run of one repetition: are its results those of the reference, bit for bit?
  virtual bool matches_reference() = 0;
};

struct Case {
  std::string name;  // segments between slashes: op/format/model/shape/rows/variant/cold or warm
  bool standard;     // in the set that runs without a filter
  std::function<std::unique_ptr<Workload>(int threads)> make;
};

using Cases = std::vector<Case>;

// `cold_bytes`: what has to be read between two reads of the same bytes, so that these come from memory.
void add_matmul_cases(Cases& cases, size_t cold_bytes);
void add_attention_cases(Cases& cases, size_t cold_bytes);
void add_row_cases(Cases& cases);
void add_sample_cases(Cases& cases);

// Variants worth timing without being asked: the best this CPU has.
bool is_best_isa(const char* isa);

}  // namespace setpoint::bench
