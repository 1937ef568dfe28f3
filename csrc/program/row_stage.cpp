#include "program/row_stage.h"

#include <algorithm>

namespace setpoint {

namespace {

constexpr int kRowTile = 8;  // rows that pass through a stage's ops together

}  // namespace

void RowStage::add(std::unique_ptr<RowOp> op) {
  const RowOp::Slots slots = op->slots();
  for (const int slot : slots.read)
    if (!written_.values.has(slot)) read_.add(slot);
  if (slots.written >= 0) {
    repeatable_ = repeatable_ && !read_.has(slots.written);
    written_.values.add(slots.written);
  }
  if (slots.quantized >= 0) written_.quantized.add(slots.quantized);
  ops_.push_back(std::move(op));
}

void RowStage::run_rows(const Step& step, const SlotView& view, int begin, int end) const {
  for (; begin < end; begin += kRowTile)
    for (const auto& op : ops_) op->run(step, view, begin, std::min(begin + kRowTile, end));
}

void RowStage::run(const Step& step, int thread) {
  const long rows = step.num_rows(wanted_), threads = step.pool.team();
  // Rounded up, so that a single row is the caller's: it is awake for certain.
  run_rows(step, SlotView(step.work), static_cast<int>((rows * thread + threads - 1) / threads),
           static_cast<int>((rows * (thread + 1) + threads - 1) / threads));
}

SlotView RowStage::lead_in(const Step& step, int thread) {
  const int rows = step.num_rows(wanted_);
  if (repeatable_ && rows <= kPrivateRows) {
    const SlotView view(step.work, thread == 0 ? nullptr : &written_, thread);
    run_rows(step, view, 0, rows);
    return view;
  }
  run(step, thread);
  step.pool.barrier();
  return SlotView(step.work);
}

}  // namespace setpoint
