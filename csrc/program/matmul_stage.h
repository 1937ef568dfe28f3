// Matmuls that read one source and write different slots: one stage, one
// barrier (q, k and v; gate and up).
#pragma once
#include <atomic>
#include <vector>

#include "program/stage.h"

namespace setpoint {

// y = x W^T by panels of 16 output channels, spread over the threads. Also the
// head's matmul.
void run_matmul(const KernelTable& kernels, const MatmulArgs& args);

// Which (rows, panels) a thread computes. Few rows: one contiguous share of the
// panels each, so every thread streams its part of the weights. Many rows:
// chunks taken from a counter, so a slow thread costs one chunk at most.
class MatmulSchedule {
 public:
  void reset(int rows, int panels, int threads);
  // Calls visit(row_begin, row_end, panel_begin, panel_end) for this thread's
  // work.
  template <class Visit>
  void run(int thread, Visit&& visit) {
    if (rows_ == 0) return;
    if (chunk_panels_ == 0) {
      const long begin = static_cast<long>(panels_) * thread / threads_, end = static_cast<long>(panels_) * (thread + 1) / threads_;
      if (begin < end) visit(0, rows_, static_cast<int>(begin), static_cast<int>(end));
      return;
    }
    for (;;) {
      const int chunk = next_.fetch_add(1, std::memory_order_relaxed);
      const int column = chunk / row_tiles_, tile = chunk % row_tiles_, first = column * chunk_panels_;
      if (first >= panels_) return;
      const int last = first + chunk_panels_ < panels_ ? first + chunk_panels_ : panels_;
      const int row_begin = tile * tile_rows_, row_end = row_begin + tile_rows_ < rows_ ? row_begin + tile_rows_ : rows_;
      visit(row_begin, row_end, first, last);
    }
  }

 private:
  int rows_ = 0, panels_ = 0, threads_ = 1;
  int row_tiles_ = 1, tile_rows_ = 0;
  int chunk_panels_ = 0;  // 0 = static shares
  alignas(64) std::atomic<int> next_{0};
};

class MatmulStage : public Stage {
 public:
  struct Item {
    PackedWeight weight;
    int out = 0;
    std::vector<float> bias;
    bool accumulate = false;
  };

  // Reads Workspace::quantized when the weights are quantized codes, else slot
  // `in`.
  MatmulStage(int in, bool quantized, bool wanted) : in_(in), quantized_(quantized), wanted_(wanted) {}
  // Whether `item` may run beside the others: same source, another output.
  bool accepts(int in, bool quantized, const Item& item) const;
  void add(Item item);

  StageKind kind() const override { return StageKind::matmul; }
  void prepare(const Step& step) override { schedule_.reset(step.num_rows(wanted_), panels_, step.pool.size()); }
  void run(const Step& step, int thread) override;

 private:
  int in_;
  bool quantized_;
  bool wanted_;     // only the rows whose logits are wanted
  int panels_ = 0;  // of all items
  std::vector<Item> items_;
  MatmulSchedule schedule_;
};

}  // namespace setpoint
