// An array of strings as GGUF stores it: each a little-endian 64-bit size and its bytes. Written by a stranger.
#pragma once
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace setpoint {

// Reads the strings one after another; every size is checked against what is left.
class StringArrayReader {
 public:
  StringArrayReader(std::span<const uint8_t> bytes, size_t position) : bytes_(bytes), position_(position) {}

  // False when the next string ends past the end of the bytes.
  bool next(std::string_view& text) {
    if (position_ > bytes_.size() || bytes_.size() - position_ < 8) return false;
    uint64_t size;
    std::memcpy(&size, bytes_.data() + position_, 8);
    const size_t begin = position_ + 8;
    if (size > bytes_.size() - begin) return false;
    text = {reinterpret_cast<const char*>(bytes_.data()) + begin, size_t(size)};
    position_ = begin + size_t(size);
    return true;
  }

  size_t position() const { return position_; }

 private:
  std::span<const uint8_t> bytes_;
  size_t position_;
};

}  // namespace setpoint
