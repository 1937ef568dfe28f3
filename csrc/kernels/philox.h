// Philox4x32-10, a counter-based generator: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random
// Numbers: As Easy as 1, 2, 3", SC 2011. It has no state: a draw is a pure function of (seed, position), so neither
// batching nor preemption nor speculation can move it.
#pragma once
#include <cstdint>

namespace setpoint {

struct Philox4 {
  uint32_t word[4];
};

inline Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1), 53 bits. Key = seed; counter = (position low, position high, stream, 0).
inline double random_uniform(uint64_t seed, int64_t position, uint32_t stream = 0) {
  const uint64_t p = static_cast<uint64_t>(position);
  const Philox4 r = philox4x32({{static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), stream, 0u}}, static_cast<uint32_t>(seed),
                               static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = uint64_t{r.word[0]} << 32 | r.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace setpoint
