// Memory that a thread will need soon, fetched into its cache while it would only wait.
//
// A small step is bound by reading weights, and the memory idles wherever threads wait for each other or compute
// something else: between two matmuls each thread fetches the begin of its next share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>

namespace setpoint {

class alignas(64) ReadAhead {
 public:
  // To go on with `memory`, unless it is what was being fetched already.
  void aim(std::span<const uint8_t> memory) {
    if (memory.data() == begin_) return;
    begin_ = at_ = memory.data();
    size_ = memory.size();
  }
  // At most `bytes` more, and no further than `limit` bytes from the begin. False when nothing is left.
  bool fetch(size_t bytes, size_t limit) {
    const size_t done = static_cast<size_t>(at_ - begin_), end = std::min({done + bytes, limit, size_});
    if (done >= end) return false;
    for (; at_ < begin_ + end; at_ += kLine) __builtin_prefetch(at_, 0, 3);
    return true;
  }

 private:
  static constexpr size_t kLine = 64;
  const uint8_t* begin_ = nullptr;
  const uint8_t* at_ = nullptr;
  size_t size_ = 0;
};

}  // namespace setpoint
