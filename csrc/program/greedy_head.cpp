#include "program/greedy_head.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace setpoint {

namespace {

constexpr int kPlanePanels = 12;  // both planes pass over so many panels while these are in the cache
constexpr int kRetryPanels = 16;  // rows take turns with so many panels, for the same reason
// A screening that leaves more than this part of the panels costs more than it saves: go without it for a while.
// Few rows save time at the memory, many save products, which retries of single rows use up sooner.
constexpr int kFewRows = 4;
constexpr double kMostRetriedOfFew = 0.25, kMostRetried = 0.08;
constexpr int kStepsWithout = 256;

}  // namespace

void HeadRows::multiply(const KernelTable& kernels, int row_begin, int row_end, int panel_begin, int panel_end) const {
  MatmulArgs args;
  args.weight = &weight;
  args.out = logits.values.data();
  args.out_stride = logits.stride;
  args.row_begin = row_begin;
  args.row_end = row_end;
  for (int panel = panel_begin; panel < panel_end; panel += kPlanePanels) {
    args.panel_begin = panel;
    args.panel_end = std::min(panel + kPlanePanels, panel_end);
    args.q = coarse.view();
    args.accumulate = false;
    run_matmul(kernels, args);
    args.q = fine.view();
    args.accumulate = true;
    run_matmul(kernels, args);
  }
}

GreedyHead::GreedyHead(Shortlist shortlist, int threads, int max_rows)
    : max_rows_(max_rows),
      shortlist_(std::move(shortlist)),
      covered_(static_cast<size_t>(max_rows)),
      threshold_(static_cast<size_t>(max_rows)),
      best_(static_cast<size_t>(threads) * static_cast<size_t>(max_rows)),
      retried_(static_cast<size_t>(threads)) {}

void GreedyHead::prepare() {
  if (steps_without_ > 0) --steps_without_;
  const long retried = std::accumulate(retried_.begin(), retried_.end(), 0L);
  const double most = rows_ <= kFewRows ? kMostRetriedOfFew : kMostRetried;
  if (static_cast<double>(retried) > most * static_cast<double>(screened_)) steps_without_ = kStepsWithout;
  all_retried_ += retried;
  all_screened_ += screened_;
  std::fill(retried_.begin(), retried_.end(), 0);
  screened_ = 0;
}

bool GreedyHead::covers(int rows) const {
  return steps_without_ == 0 && std::all_of(covered_.begin(), covered_.begin() + rows, [](char covered) { return covered != 0; });
}

GreedyHead::Best GreedyHead::best_of_panel(const HeadRows& rows, int row, int panel) const {
  const float* logits = rows.logits.row(row);
  Best best{-std::numeric_limits<float>::infinity(), panel * 16};
  for (int channel = panel * 16; channel < std::min(panel * 16 + 16, rows.weight.n); ++channel)
    if (logits[channel] > best.logit) best = {logits[channel], channel};
  return best;
}

void GreedyHead::find(const Step& step, const HeadRows& rows, MatmulSchedule& schedule, int thread) {
  schedule.run(thread, step.pool.team(), [&](int row_begin, int row_end, int panel_begin, int panel_end) {
    MatmulArgs args;
    args.q = rows.coarse.view();
    args.out = rows.logits.values.data();
    args.out_stride = rows.logits.stride;
    args.row_begin = row_begin;
    args.row_end = row_end;
    args.panel_begin = panel_begin;
    args.panel_end = panel_end;
    shortlist_.screen(step.kernels, args);
  });
  step.pool.barrier();
  for (int row = thread; row < rows.count; row += step.pool.team()) {
    const int panel = shortlist_.most_promising(row);
    rows.multiply(step.kernels, row, row + 1, panel, panel + 1);
    threshold_[static_cast<size_t>(row)] = best_of_panel(rows, row, panel).logit;
  }
  if (thread == 0) {
    rows_ = rows.count;
    screened_ += static_cast<long>(rows.count) * rows.weight.panels();
  }
  step.pool.barrier();
  try_others(step, rows, thread);
  step.pool.barrier();
}

// A thread's share of the panels, each in full for the rows whose best may be in it.
void GreedyHead::try_others(const Step& step, const HeadRows& rows, int thread) {
  const long panels = rows.weight.panels(), team = step.pool.team();
  const int begin = static_cast<int>(panels * thread / team), end = static_cast<int>(panels * (thread + 1) / team);
  Best* best = best_.data() + static_cast<size_t>(thread) * static_cast<size_t>(max_rows_);
  std::fill_n(best, rows.count, Best{-std::numeric_limits<float>::infinity(), -1});
  for (int first = begin; first < end; first += kRetryPanels) {
    const int last = std::min(first + kRetryPanels, end);
    for (int row = 0; row < rows.count; ++row) {
      for (int panel = first; panel < last; ++panel) {
        if (shortlist_.upper(row, panel) < std::max(threshold_[static_cast<size_t>(row)], best[row].logit)) continue;
        rows.multiply(step.kernels, row, row + 1, panel, panel + 1);
        ++retried_[static_cast<size_t>(thread)];
        const Best here = best_of_panel(rows, row, panel);
        if (here.logit > best[row].logit) best[row] = here;
      }
    }
  }
}

int GreedyHead::token(int row, int team) const {
  Best best{-std::numeric_limits<float>::infinity(), -1};
  for (int thread = 0; thread < team; ++thread) {
    const Best& other = best_[static_cast<size_t>(thread) * static_cast<size_t>(max_rows_) + static_cast<size_t>(row)];
    if (other.logit > best.logit) best = other;
  }
  return best.token;
}

}  // namespace setpoint
