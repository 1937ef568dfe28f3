#include "program/greedy_head.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace setpoint {

namespace {

constexpr int kPlanePanels = 12;  // both planes pass over so many panels while these are in the cache
constexpr int kRetryPanels = 16;  // rows take turns with so many panels, for the same reason
// Up to so many rows the 5-bit copy is screened, which saves time at the memory; above, the whole matrix by one plane.
constexpr int kCopyRows = 8;
// A screening that leaves more than this part of the panels costs more than it saves: go without it for a while. Where
// it saves products and not bytes, retries of single rows use that up sooner.
constexpr int kFewRows = 4;
constexpr double kMostRetriedOfFew = 0.25, kMostRetried = 0.08;
constexpr int kStepsWithout = 256;

}  // namespace

// args: rows and panels. The fine plane's product is added to what is there.
void HeadRows::multiply_plane(const KernelTable& kernels, MatmulArgs args, bool is_fine) const {
  args.weight = &weight;
  args.q = (is_fine ? fine : coarse).view();
  args.accumulate = is_fine;
  args.out = logits.values.data();
  args.out_stride = logits.stride;
  run_matmul(kernels, args);
}

void HeadRows::add_fine(const KernelTable& kernels, int row, int panel) const {
  MatmulArgs args;
  args.row_begin = row;
  args.row_end = row + 1;
  args.panel_begin = panel;
  args.panel_end = panel + 1;
  multiply_plane(kernels, args, true);
}

void HeadRows::multiply(const KernelTable& kernels, int row_begin, int row_end, int panel_begin, int panel_end) const {
  MatmulArgs args;
  args.row_begin = row_begin;
  args.row_end = row_end;
  for (int panel = panel_begin; panel < panel_end; panel += kPlanePanels) {
    args.panel_begin = panel;
    args.panel_end = std::min(panel + kPlanePanels, panel_end);
    multiply_plane(kernels, args, false);
    multiply_plane(kernels, args, true);
  }
}

GreedyHead::GreedyHead(Shortlist shortlist, int threads, int max_rows)
    : max_rows_(max_rows),
      shortlist_(std::move(shortlist)),
      covered_(static_cast<size_t>(max_rows)),
      first_(static_cast<size_t>(max_rows)),
      best_(static_cast<size_t>(threads) * static_cast<size_t>(max_rows)),
      retried_(static_cast<size_t>(threads)) {}

double GreedyHead::retried_part() const {
  const long screened = tallies_[copy].all_screened + tallies_[whole].all_screened;
  return screened == 0 ? 0. : static_cast<double>(tallies_[copy].all_retried + tallies_[whole].all_retried) / static_cast<double>(screened);
}

void GreedyHead::prepare() {
  for (Tally& tally : tallies_) {
    if (tally.steps_without > 0) --tally.steps_without;
    const double most = rows_ <= kFewRows ? kMostRetriedOfFew : kMostRetried;
    if (static_cast<double>(tally.retried) > most * static_cast<double>(tally.screened)) tally.steps_without = kStepsWithout;
    tally.all_retried += std::exchange(tally.retried, 0);
    tally.all_screened += std::exchange(tally.screened, 0);
  }
}

GreedyHead::Screen GreedyHead::screen_for(int rows) const {
  if (rows <= kCopyRows && tallies_[copy].steps_without == 0) return copy;
  return tallies_[whole].steps_without == 0 ? whole : kScreens;
}

bool GreedyHead::covers(int rows) const {
  return screen_for(rows) != kScreens && std::all_of(covered_.begin(), covered_.begin() + rows, [](char covered) { return covered != 0; });
}

const PackedWeight& GreedyHead::first_weight(const PackedWeight& whole, int rows) const {
  return screen_for(rows) == copy ? shortlist_.weight() : whole;
}

// The exact logits of a panel, of which the row knows a bound so far. Once for each of them. What the row's mask
// forbids is never the best.
GreedyHead::Best GreedyHead::multiply(const Step& step, const HeadRows& rows, Screen screen, int row, int panel) {
  if (screen == whole)
    rows.add_fine(step.kernels, row, panel);
  else
    rows.multiply(step.kernels, row, row + 1, panel, panel + 1);
  const float* logits = rows.logits.row(row);
  const uint32_t allowed = rows.allowed(row, panel);
  Best best{-std::numeric_limits<float>::infinity(), panel * 16};
  for (int channel = panel * 16; channel < std::min(panel * 16 + 16, rows.weight.n); ++channel)
    if ((allowed >> channel % 16 & 1) != 0 && logits[channel] > best.logit) best = {logits[channel], channel};
  return best;
}

void GreedyHead::find(const Step& step, const HeadRows& rows, MatmulSchedule& schedule, int thread) {
  const Screen screen = screen_for(rows.count);
  schedule.run(thread, step.pool.team(), [&](int row_begin, int row_end, int panel_begin, int panel_end) {
    MatmulArgs args;
    args.weight = &rows.weight;
    args.q = rows.coarse.view();
    args.out = rows.logits.values.data();
    args.out_stride = rows.logits.stride;
    args.row_begin = row_begin;
    args.row_end = row_end;
    args.panel_begin = panel_begin;
    args.panel_end = panel_end;
    if (screen == copy)
      shortlist_.screen_copy(step.kernels, args);
    else
      shortlist_.screen_whole(step.kernels, args);
  });
  step.pool.barrier();
  for (int row = thread; row < rows.count; row += step.pool.team()) {
    if (rows.is_masked(row)) leave_out_forbidden(rows, row);
    const int panel = shortlist_.most_promising(row);
    first_[static_cast<size_t>(row)] = multiply(step, rows, screen, row, panel);
    shortlist_.leave_out(row, panel);
  }
  step.pool.barrier();
  try_others(step, rows, screen, thread);
  step.pool.barrier();
  if (thread == 0) {
    rows_ = rows.count;
    tallies_[screen].screened += static_cast<long>(rows.count) * rows.weight.panels();
    tallies_[screen].retried += std::accumulate(retried_.begin(), retried_.end(), static_cast<long>(rows.count));
    std::fill(retried_.begin(), retried_.end(), 0);
  }
}

void GreedyHead::leave_out_forbidden(const HeadRows& rows, int row) {
  for (int panel = 0; panel < rows.weight.panels(); ++panel)
    if (rows.allowed(row, panel) == 0) shortlist_.leave_out(row, panel);
}

// A thread's share of the panels, each in full for the rows whose best may be in it.
void GreedyHead::try_others(const Step& step, const HeadRows& rows, Screen screen, int thread) {
  const long panels = rows.weight.panels(), team = step.pool.team();
  const int begin = static_cast<int>(panels * thread / team), end = static_cast<int>(panels * (thread + 1) / team);
  Best* best = best_.data() + static_cast<size_t>(thread) * static_cast<size_t>(max_rows_);
  std::copy_n(first_.begin(), rows.count, best);
  for (int first = begin; first < end; first += kRetryPanels) {
    const int last = std::min(first + kRetryPanels, end);
    for (int row = 0; row < rows.count; ++row) {
      for (int panel = first; panel < last; ++panel) {
        if (shortlist_.upper(row, panel) < best[row].logit) continue;
        const Best here = multiply(step, rows, screen, row, panel);
        ++retried_[static_cast<size_t>(thread)];
        if (here.beats(best[row])) best[row] = here;
      }
    }
  }
}

int GreedyHead::token(int row, int team) const {
  Best best = first_[static_cast<size_t>(row)];
  for (int thread = 0; thread < team; ++thread) {
    const Best& other = best_[static_cast<size_t>(thread) * static_cast<size_t>(max_rows_) + static_cast<size_t>(row)];
    if (other.beats(best)) best = other;
  }
  return best.token;
}

}  // namespace setpoint
