// What a step waits for while others prepare it: shut until somebody opens it, once.
#pragma once
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace setpoint {

class Gate {
 public:
  explicit Gate(double patience_s) : patience_(patience_s) {}
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  // Writes before it are visible to whoever it lets through.
  void open() {
    const std::lock_guard lock(mutex_);
    is_open_ = true;
    opened_.notify_all();
  }
  // False when it stays shut for longer than its patience.
  bool pass() {
    std::unique_lock lock(mutex_);
    return opened_.wait_for(lock, patience_, [this] { return is_open_; });
  }

 private:
  const std::chrono::duration<double> patience_;
  std::mutex mutex_;
  std::condition_variable opened_;
  bool is_open_ = false;
};

}  // namespace setpoint
