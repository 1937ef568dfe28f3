// Matmuls that read one source and write different slots: one stage, one
// barrier (q, k and v; gate and up), with the row ops around them that need none.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "program/row_ops.h"

namespace setpoint {

// y = x W^T by panels of 16 output channels, spread over the threads. Also the
// head's matmul.
void run_matmul(const KernelTable& kernels, const MatmulArgs& args);
// The stored weights from a panel on.
std::span<const uint8_t> stored_from(const PackedWeight& weight, int panel);

// Which (rows, panels) a thread computes. Few rows: one contiguous share of the
// panels each, so every thread streams its part of the weights. Many rows:
// chunks taken from a counter, so a slow thread costs one chunk at most.
class MatmulSchedule {
 public:
  // Ranges of panels begin and end at multiples of `unit`, the last end aside.
  void reset(int rows, int panels, int threads, int unit = 1);
  // Calls visit(row_begin, row_end, panel_begin, panel_end) for the work of one
  // of `team` threads.
  template <class Visit>
  void run(int thread, int team, Visit&& visit) {
    if (rows_ == 0) return;
    if (chunk_panels_ == 0) {
      const int begin = share(thread, team), end = share(thread + 1, team);
      if (begin < end) visit(0, rows_, begin, end);
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

  // A thread's first panel, or -1 where that is not known before.
  int first_panel(int thread, int team) const {
    const int panel = share(thread, team);
    return rows_ > 0 && chunk_panels_ == 0 && panel < panels_ ? panel : -1;
  }

 private:
  int share(int thread, int team) const {  // first panel of a thread
    const long units = (panels_ + unit_ - 1) / unit_;
    return std::min(panels_, static_cast<int>(units * thread / team) * unit_);
  }

  int rows_ = 0, panels_ = 0, unit_ = 1;
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

  // Reads the 8-bit copy of slot `in` when the weights are quantized codes, else its values. `before`, which may be
  // null, makes them.
  MatmulStage(int in, bool quantized, bool wanted, std::unique_ptr<RowStage> before)
      : in_(in), quantized_(quantized), wanted_(wanted), before_(std::move(before)) {}
  // Whether `item` may run beside the others: same source, another output.
  bool accepts(int in, bool quantized, const Item& item) const;
  void add(Item item);
  // Whether the items are just these two, of one shape; then gate = act(gate) * up follows chunk by chunk, while it
  // is in cache.
  bool multiplies(int gate, int up) const;
  void follow_with(Activation act) { activation_ = act; }
  // The slot that holds act(gate) * up, or -1; and its 8-bit copy follows as well.
  int gated_slot() const { return activation_ ? items_[0].out : -1; }
  void follow_with_quantize() { quantizes_gated_ = true; }
  const RowStage* before() const { return before_.get(); }

  StageKind kind() const override { return StageKind::matmul; }
  void prepare(const Step& step) override;
  void run(const Step& step, int thread) override;
  std::span<const uint8_t> first_reads(const Step&, int thread) const override;

 private:
  void multiply(const Step& step, const Item& item, MatmulArgs args, int panel_begin, int panel_end) const;
  void finish_gated(const Step& step, const MatmulArgs& chunk) const;

  int in_;
  bool quantized_;
  bool wanted_;  // only the rows whose logits are wanted
  std::unique_ptr<RowStage> before_;
  std::vector<Item> items_;
  std::optional<Activation> activation_;
  bool quantizes_gated_ = false;
  MatmulSchedule schedule_;
};

}  // namespace setpoint
