// Random numbers fast enough to fill weights with; the same in every run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace setpoint::bench {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int bound) { return int(next() % uint64_t(bound)); }
  float symmetric() { return float(int64_t(next()) >> 40) * 0x1p-23f; }  // in [-1, 1)

  void fill(uint8_t* data, size_t bytes) {
    for (; bytes >= 8; data += 8, bytes -= 8) {
      const uint64_t word = next();
      std::memcpy(data, &word, 8);
    }
    const uint64_t word = next();
    std::memcpy(data, &word, bytes);
  }
  // A sum of four uniforms: near enough to the normal distribution of activations, and with outliers.
  void fill_activations(float* data, size_t count) {
    for (size_t i = 0; i < count; ++i) data[i] = (symmetric() + symmetric() + symmetric() + symmetric()) * (next() % 512 == 0 ? 16.f : 1.f);
  }

 private:
  uint64_t state_;
};

}  // namespace setpoint::bench
