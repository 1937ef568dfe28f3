// What a lowered program is made of: stages that all threads run together, with
// a barrier after each.
#pragma once
#include <span>

#include "core/thread_pool.h"
#include "program/batch.h"
#include "program/workspace.h"

namespace setpoint {

// Everything a stage sees of the running step.
struct Step {
  const KernelTable& kernels;
  const Batch& batch;
  const KvCache& kv;
  Workspace& work;
  ThreadPool& pool;

  int num_rows(bool wanted) const { return wanted ? batch.num_rows() : batch.num_tokens(); }
};

enum class StageKind : uint8_t { rows, matmul, attention, head };
constexpr int kStageKinds = 4;

class Stage {
 public:
  virtual ~Stage() = default;
  virtual StageKind kind() const = 0;
  virtual void prepare(const Step&) {}  // by one thread, before the step starts
  virtual void run(const Step& step,
                   int thread) = 0;  // by every thread; may meet at barriers itself
  // The weights that `thread` will read first; empty where that is not known before, or not worth while.
  virtual std::span<const uint8_t> first_reads(const Step&, int /*thread*/) const { return {}; }
};

}  // namespace setpoint
