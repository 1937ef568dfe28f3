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
    if (size_ < most_ && ++rested_ >= rest_) {
      size_ = most_;
      seconds_ = stalled_ = 0;
      runs_ = 0;
      return;
    }
    if (size_ < most_ || most_ == 1) return;
    seconds_ += seconds;
    stalled_ += stalled;
    if (++runs_ < kWindow) return;
    if (stalled_ * most_ > kWorthOneThread * seconds_) {
      size_ = most_ - 1;
      rested_ = 0;
      rest_ = std::min(2 * rest_, kLongestRest);
    } else {
      rest_ = kShortestRest;
    }
    seconds_ = stalled_ = 0;
    runs_ = 0;
  }

 private:
  static constexpr int kWindow = 8, kShortestRest = 32, kLongestRest = 1024;  // runs
  static constexpr double kWorthOneThread = 0.8;                              // of what one of the threads contributes

  const int most_;
  int size_;
  double seconds_ = 0, stalled_ = 0;
  int runs_ = 0, rested_ = 0, rest_ = kShortestRest;
};

}  // namespace setpoint
