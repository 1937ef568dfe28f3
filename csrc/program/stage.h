// What a lowered program is made of: stages that all threads run together, with
// a barrier after each.
#pragma once
#include <memory>
#include <vector>

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
};

// An op that treats every row by itself. Consecutive ones form one stage: a
// thread takes a few of its rows through all of them while they are in cache.
// Rows are the step's tokens or, after Program::select_rows, the wanted ones.
class RowOp {
 public:
  virtual ~RowOp() = default;
  virtual void run(const Step& step, int begin,
                   int end) const = 0;  // rows [begin, end)
};

class RowStage : public Stage {
 public:
  explicit RowStage(bool wanted) : wanted_(wanted) {}
  StageKind kind() const override { return StageKind::rows; }
  void add(std::unique_ptr<RowOp> op) { ops_.push_back(std::move(op)); }
  void run(const Step& step, int thread) override;

 private:
  bool wanted_;
  std::vector<std::unique_ptr<RowOp>> ops_;
};

}  // namespace setpoint
