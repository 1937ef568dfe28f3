// How many threads a run should have, from how long they wait for each other.
//
// A thread whose CPU is shared with a busy process is away for milliseconds at a time, and all others wait for it at
// the next barrier: beyond some point one thread less is faster. It is tried again from time to time.
#pragma once
#include <algorithm>

namespace setpoint {

class TeamSize {
 public:
  explicit TeamSize(int threads) : most_(threads), size_(threads) {}
  int size() const { return size_; }

  // After a run of `seconds` in which each thread slept at barriers for `stalled` seconds on average.
  void note(double seconds, double stalled) {
    if (most_ == 1) return;
    if (size_ < most_) {
      if (++rested_ == rest_) size_ = most_;
      return;
    }
    bad_ += stalled * most_ > kWorthOneThread * seconds;
    const bool on_trial = rest_ > kShortestRest;
    if (++runs_ < (on_trial ? kTrial : kWindow)) return;
    if (2 * bad_ > runs_) {
      size_ = most_ - 1;
      rested_ = 0;
      rest_ = std::min(2 * rest_, kLongestRest);
    } else {
      rest_ = kShortestRest;
    }
    runs_ = bad_ = 0;
  }

 private:
  // In runs. They are counted, not added up: a single one may stall long for reasons that pass.
  static constexpr int kWindow = 12, kTrial = 4, kShortestRest = 32, kLongestRest = 256;
  static constexpr double kWorthOneThread = 0.8;  // of what one of the threads contributes

  const int most_;
  int size_;
  int runs_ = 0, bad_ = 0, rested_ = 0, rest_ = kShortestRest;
};

}  // namespace setpoint
