#include "program/matmul_stage.h"

#include <algorithm>

namespace setpoint {

namespace {

constexpr int kStaticRows = 32;   // up to here a matmul is short, and reading the weights is much of it
constexpr int kTileRows = 256;    // activations of a chunk stay in L2
constexpr int kRowUnit = 32;      // the kernels' block of rows
constexpr int kChunkPanels = 12;  // whole register tiles of three panels as well as of four
constexpr int kChunksPerThread = 8;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

void run_matmul(const KernelTable& kernels, const MatmulArgs& args) {
  if (args.weight->is_quantized())
    kernels.matmul_quantized(args);
  else
    kernels.matmul_float(args);
}

void MatmulSchedule::reset(int rows, int panels, int threads) {
  rows_ = rows;
  panels_ = panels;
  threads_ = threads;
  next_.store(0, std::memory_order_relaxed);
  row_tiles_ = 1;
  tile_rows_ = rows;
  chunk_panels_ = 0;
  if (rows <= kStaticRows) return;
  chunk_panels_ = kChunkPanels;
  const int wanted = std::max(ceil_div(kChunksPerThread * threads, ceil_div(panels, kChunkPanels)), ceil_div(rows, kTileRows));
  tile_rows_ = ceil_div(ceil_div(rows, wanted), kRowUnit) * kRowUnit;
  row_tiles_ = ceil_div(rows, tile_rows_);
}

bool MatmulStage::accepts(int in, bool quantized, const Item& item) const {
  return in == in_ && quantized == quantized_ && item.out != in_ &&
         std::none_of(items_.begin(), items_.end(), [&](const Item& other) { return other.out == item.out; });
}

void MatmulStage::add(Item item) {
  panels_ += item.weight.panels();
  items_.push_back(std::move(item));
}

void MatmulStage::run(const Step& step, int thread) {
  FloatRows& in = step.work.slots[static_cast<size_t>(in_)];
  MatmulArgs args;
  args.x = in.values.data();
  args.x_stride = in.stride;
  args.q = step.work.quantized.view();
  schedule_.run(thread, [&](int row_begin, int row_end, int panel_begin, int panel_end) {
    args.row_begin = row_begin;
    args.row_end = row_end;
    for (const Item& item : items_) {  // the panels of all items in a row, as one range
      const int panels = item.weight.panels();
      args.panel_begin = std::max(0, panel_begin);
      args.panel_end = std::min(panels, panel_end);
      if (args.panel_begin < args.panel_end) {
        FloatRows& out = step.work.slots[static_cast<size_t>(item.out)];
        args.weight = &item.weight;
        args.out = out.values.data();
        args.out_stride = out.stride;
        args.bias = item.bias.empty() ? nullptr : item.bias.data();
        args.accumulate = item.accumulate;
        run_matmul(step.kernels, args);
      }
      panel_begin -= panels;
      panel_end -= panels;
    }
  });
}

}  // namespace setpoint
