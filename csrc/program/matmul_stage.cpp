#include "program/matmul_stage.h"

#include "kernels/packed_layout.h"

namespace setpoint {

namespace {

constexpr int kStaticRows = 32;                       // up to here a matmul is short, and reading the weights is much of it
constexpr int kMinTileRows = 96, kMaxTileRows = 256;  // enough to pay for unpacking weights; activations that fit in L2
constexpr int kRowUnit = 4;                           // the kernels' register tile
constexpr int kPanelUnit = 3;                         // likewise
constexpr int kMaxChunkPanels = 12;
constexpr int kChunksPerThread = 8;
constexpr int kGatedUnit = 2;  // panels: a group of 32 activations is quantized as a whole

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

void run_matmul(const KernelTable& kernels, const MatmulArgs& args) {
  if (args.weight->is_quantized())
    kernels.matmul_quantized(args);
  else
    kernels.matmul_float(args);
}

std::span<const uint8_t> stored_from(const PackedWeight& weight, int panel) {
  constexpr size_t float_bytes[] = {4, 2, 2};
  const size_t bytes =
      weight.is_quantized() ? panel_bytes(weight) : 16 * static_cast<size_t>(weight.k) * float_bytes[static_cast<size_t>(weight.codes)];
  return {weight.data + static_cast<size_t>(panel) * bytes, static_cast<size_t>(weight.panels() - panel) * bytes};
}

void MatmulSchedule::reset(int rows, int panels, int threads, int unit) {
  rows_ = rows;
  unit_ = unit;
  panels_ = panels;
  next_.store(0, std::memory_order_relaxed);
  row_tiles_ = 1;
  tile_rows_ = rows;
  chunk_panels_ = 0;
  if (rows <= kStaticRows) return;
  const int wanted = kChunksPerThread * threads;
  row_tiles_ = ceil_div(rows, kMaxTileRows);
  const int panel_unit = kPanelUnit * unit;
  chunk_panels_ = std::clamp(panels * row_tiles_ / wanted, panel_unit, kMaxChunkPanels) / panel_unit * panel_unit;
  row_tiles_ = std::max(row_tiles_, std::min(rows / kMinTileRows, ceil_div(wanted, ceil_div(panels, chunk_panels_))));
  tile_rows_ = ceil_div(ceil_div(rows, row_tiles_), kRowUnit) * kRowUnit;
  row_tiles_ = ceil_div(rows, tile_rows_);
}

bool MatmulStage::accepts(int in, bool quantized, const Item& item) const {
  return in == in_ && quantized == quantized_ && !activation_ && item.out != in_ &&
         (before_ == nullptr || before_->leaves_alone(item.out)) &&
         std::none_of(items_.begin(), items_.end(), [&](const Item& other) { return other.out == item.out; });
}

void MatmulStage::add(Item item) { items_.push_back(std::move(item)); }

bool MatmulStage::multiplies(int gate, int up) const {
  return items_.size() == 2 && items_[0].out == gate && items_[1].out == up && items_[0].weight.n == items_[1].weight.n;
}

void MatmulStage::prepare(const Step& step) {
  int panels = 0;
  for (const Item& item : items_) panels += item.weight.panels();
  const int rows = step.num_rows(wanted_), threads = step.pool.size();
  if (activation_)
    schedule_.reset(rows, panels / 2, threads, kGatedUnit);
  else
    schedule_.reset(rows, panels, threads);
}

void MatmulStage::run(const Step& step, int thread) {
  const SlotView view = before_ != nullptr ? before_->lead_in(step, thread) : SlotView(step.work);
  MatmulArgs args;
  args.x = view.values(in_).values.data();
  args.x_stride = view.values(in_).stride;
  if (quantized_) args.q = view.quantized(in_).view();
  schedule_.run(thread, step.pool.team(), [&](int row_begin, int row_end, int panel_begin, int panel_end) {
    args.row_begin = row_begin;
    args.row_end = row_end;
    if (activation_) {
      args.panel_begin = panel_begin;
      args.panel_end = panel_end;
      for (const Item& item : items_) multiply(step, item, args, panel_begin, panel_end);
      return finish_gated(step, args);
    }
    for (const Item& item : items_) {  // the panels of all items in a row, as one range
      const int panels = item.weight.panels();
      multiply(step, item, args, std::max(0, panel_begin), std::min(panels, panel_end));
      panel_begin -= panels;
      panel_end -= panels;
    }
  });
}

std::span<const uint8_t> MatmulStage::first_reads(const Step& step, int thread) const {
  int panel = schedule_.first_panel(thread, step.pool.team());
  if (panel < 0) return {};
  size_t item = 0;
  for (; panel >= items_[item].weight.panels(); ++item) panel -= items_[item].weight.panels();
  return stored_from(items_[item].weight, panel);
}

void MatmulStage::multiply(const Step& step, const Item& item, MatmulArgs args, int panel_begin, int panel_end) const {
  if (panel_begin >= panel_end) return;
  FloatRows& out = step.work.values(item.out);
  args.weight = &item.weight;
  args.panel_begin = panel_begin;
  args.panel_end = panel_end;
  args.out = out.values.data();
  args.out_stride = out.stride;
  args.bias = item.bias.empty() ? nullptr : item.bias.data();
  args.accumulate = item.accumulate;
  run_matmul(step.kernels, args);
}

void MatmulStage::finish_gated(const Step& step, const MatmulArgs& chunk) const {
  Slot& gate = step.work.slots[static_cast<size_t>(items_[0].out)];
  const int column = 16 * chunk.panel_begin, columns = std::min(16 * chunk.panel_end, gate.values.width) - column;
  multiply_gated(step, *activation_, gate.values, step.work.values(items_[1].out), chunk.row_begin, chunk.row_end, column, columns);
  if (quantizes_gated_)
    gate.quantized.quantize(step.kernels, gate.values.row(chunk.row_begin) + column, gate.values.stride, chunk.row_begin,
                            chunk.row_end - chunk.row_begin, column, columns);
}

}  // namespace setpoint
