// The output matrix for rows that want nothing but their most likely token: most of it is only screened, little is
// multiplied in full (shortlist.h).
#pragma once
#include <span>
#include <vector>

#include "program/matmul_stage.h"
#include "program/shortlist.h"

namespace setpoint {

// The inputs and logits of some rows, as the whole head keeps them.
struct HeadRows {
  int count;
  const PackedWeight& weight;
  const QuantizedActivations& coarse;
  const QuantizedActivations& fine;
  FloatRows& logits;
  const StepInputs& inputs;
  int first;  // the step's row that is row 0 here

  // Which channels of a panel the row's mask allows.
  uint32_t allowed(int row, int panel) const {
    const RowRecord& record = inputs.rows[static_cast<size_t>(first + row)];
    if (record.mask_end < 0) return 0xffff;
    return inputs.masks[static_cast<size_t>(record.mask_begin + panel / 2)] >> panel % 2 * 16 & 0xffff;
  }
  bool is_masked(int row) const { return inputs.rows[static_cast<size_t>(first + row)].mask_end >= 0; }

  // Exact logits of some rows and panels; add_fine: where the coarse plane's part is there already.
  void add_fine(const KernelTable& kernels, int row, int panel) const;
  void multiply(const KernelTable& kernels, int row_begin, int row_end, int panel_begin, int panel_end) const;

 private:
  void multiply_plane(const KernelTable& kernels, MatmulArgs args, bool is_fine) const;
};

class GreedyHead {
 public:
  GreedyHead(Shortlist shortlist, int threads, int max_rows);

  size_t num_bytes() const { return shortlist_.num_bytes(); }
  // Of all panels screened so far, the part that had to be multiplied in full.
  double retried_part() const;
  // By one thread, before the threads load the rows of a step.
  void prepare();
  void load_row(int row, const HeadRows& rows) { covered_[static_cast<size_t>(row)] = shortlist_.load_row(row, rows.coarse, rows.fine); }
  // Whether it pays now for so many rows, and every one of the loaded rows is covered.
  bool covers(int rows) const;
  const PackedWeight& first_weight(const PackedWeight& whole, int rows) const;  // what find() reads first
  // By all threads together. Afterwards token(row) is the lowest id among the highest logits.
  void find(const Step& step, const HeadRows& rows, MatmulSchedule& schedule, int thread);
  int token(int row, int team) const;

 private:
  enum Screen : int { copy, whole, kScreens };
  struct Best {
    float logit;
    int token;
    bool beats(const Best& other) const { return logit > other.logit || (logit == other.logit && token < other.token); }
  };
  // What a way to screen has cost, in panels.
  struct Tally {
    long screened = 0, retried = 0;  // since the last prepare
    long all_screened = 0, all_retried = 0;
    int steps_without = 0;  // to go, because it did not pay
  };
  Screen screen_for(int rows) const;  // kScreens: none pays
  Best multiply(const Step& step, const HeadRows& rows, Screen screen, int row, int panel);
  void leave_out_forbidden(const HeadRows& rows, int row);
  void try_others(const Step& step, const HeadRows& rows, Screen screen, int thread);

  int max_rows_;
  Shortlist shortlist_;
  std::vector<char> covered_;  // [max_rows]
  std::vector<Best> first_;    // [max_rows] of its most promising panel: what is below cannot be the best
  std::vector<Best> best_;     // [threads][max_rows]
  std::vector<long> retried_;  // [threads] panels multiplied in full, in this chunk of rows
  Tally tallies_[kScreens];
  int rows_ = 0;  // of the last screening
};

}  // namespace setpoint
