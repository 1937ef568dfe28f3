// Ops that treat every row by itself, and runs of them as one stage.
#pragma once
#include <memory>
#include <vector>

#include "program/stage.h"

namespace setpoint {

// A set of slots.
class SlotSet {
 public:
  bool has(int slot) const { return static_cast<size_t>(slot) < flags_.size() && flags_[static_cast<size_t>(slot)]; }
  void add(int slot) {
    if (static_cast<size_t>(slot) >= flags_.size()) flags_.resize(static_cast<size_t>(slot) + 1);
    flags_[static_cast<size_t>(slot)] = true;
  }
  void add(const SlotSet& other) {
    for (size_t slot = 0; slot < other.flags_.size(); ++slot)
      if (other.flags_[slot]) add(static_cast<int>(slot));
  }

 private:
  std::vector<bool> flags_;
};

// What a stage's ops write: values of slots, and 8-bit copies of slots.
struct Written {
  SlotSet values, quantized;
};

// Where a thread finds slots: what `written` names is its own copy, the rest is shared.
class SlotView {
 public:
  explicit SlotView(Workspace& work, const Written* written = nullptr, int thread = 0) : work_(work), written_(written), thread_(thread) {}
  bool is_shared() const { return written_ == nullptr; }
  FloatRows& values(int slot) const { return pick(slot, written_ != nullptr && written_->values.has(slot)).values; }
  QuantizedActivations& quantized(int slot) const { return pick(slot, written_ != nullptr && written_->quantized.has(slot)).quantized; }

 private:
  Slot& pick(int slot, bool mine) const {
    return (mine ? work_.private_slots[static_cast<size_t>(thread_)] : work_.slots)[static_cast<size_t>(slot)];
  }

  Workspace& work_;
  const Written* written_;
  int thread_;
};

// Rows are the step's tokens or, after Program::select_rows, the wanted ones.
class RowOp {
 public:
  struct Slots {
    std::vector<int> read;
    int written = -1;
    int quantized = -1;
  };
  virtual ~RowOp() = default;
  virtual Slots slots() const = 0;
  virtual void run(const Step& step, const SlotView& view, int begin,
                   int end) const = 0;  // rows [begin, end)
};

// A thread takes a few of its rows through all ops while they are in cache.
class RowStage : public Stage {
 public:
  explicit RowStage(bool wanted) : wanted_(wanted) {}
  StageKind kind() const override { return StageKind::rows; }
  void add(std::unique_ptr<RowOp> op);
  void run(const Step& step, int thread) override;

  // In front of a stage that reads what this one writes: computes it, and says where `thread` finds it. A few rows
  // are computed by every thread for itself; the first thread writes them to the shared slots, for later stages.
  // More are shared out, and the threads meet at a barrier.
  SlotView lead_in(const Step& step, int thread);
  // Whether a stage may write `slot` while other threads are still in lead_in.
  bool leaves_alone(int slot) const { return !read_.has(slot) && !written_.values.has(slot); }
  const Written& written() const { return written_; }

 private:
  void run_rows(const Step& step, const SlotView& view, int begin, int end) const;

  bool wanted_;
  bool repeatable_ = true;  // no op overwrites what another thread may still have to read
  SlotSet read_;            // before the stage writes it, if it does
  Written written_;
  std::vector<std::unique_ptr<RowOp>> ops_;
};

}  // namespace setpoint
