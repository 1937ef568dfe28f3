// The output matrix for rows that want nothing but their most likely token: most of it is screened in 5 bits, little
// is read in full (shortlist.h).
#pragma once
#include <optional>
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

  // Exact logits of some rows and panels.
  void multiply(const KernelTable& kernels, int row_begin, int row_end, int panel_begin, int panel_end) const;
};

class GreedyHead {
 public:
  GreedyHead(Shortlist shortlist, int threads, int max_rows);

  size_t num_bytes() const { return shortlist_.num_bytes(); }
  // Of all panels screened so far, the part that had to be multiplied in full.
  double retried_part() const { return all_screened_ == 0 ? 0. : static_cast<double>(all_retried_) / static_cast<double>(all_screened_); }
  // By one thread, before the threads load the rows of a step.
  void prepare();
  // False when the row needs the whole matrix.
  bool load_row(int row, const HeadRows& rows) {
    return covered_[static_cast<size_t>(row)] = shortlist_.load_row(row, rows.coarse, rows.fine);
  }
  // Whether it pays now, and every one of the loaded rows is covered.
  bool covers(int rows) const;
  const PackedWeight& first_weight() const { return shortlist_.weight(); }  // what find() reads first
  // By all threads together. Afterwards token(row) is the lowest id among the highest logits.
  void find(const Step& step, const HeadRows& rows, MatmulSchedule& schedule, int thread);
  int token(int row, int team) const;

 private:
  struct Best {
    float logit;
    int token;
  };
  Best best_of_panel(const HeadRows& rows, int row, int panel) const;
  void try_others(const Step& step, const HeadRows& rows, int thread);

  int max_rows_;
  Shortlist shortlist_;
  std::vector<char> covered_;     // [max_rows]
  std::vector<float> threshold_;  // [max_rows] an exact logit: what is below cannot be the best
  std::vector<Best> best_;        // [threads][max_rows]
  std::vector<long> retried_;     // [threads] panels multiplied in full since the last prepare
  long screened_ = 0;             // panels screened since then
  long all_retried_ = 0, all_screened_ = 0;
  int rows_ = 0;           // of the last screening
  int steps_without_ = 0;  // to go, because the shortlist did not pay
};

}  // namespace setpoint
