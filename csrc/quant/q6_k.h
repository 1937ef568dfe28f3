// Q6_K, 256 weights: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, f16 d.
// w = d * scale * (code - 32), one scale per 16 weights; 64 bytes hold 64 low, then 64 high nibbles.
#pragma once
#include "quant/q2_k.h"

namespace setpoint {

inline void unpack_q6_k(const uint8_t* block, uint8_t* codes, float* scales, float*) {
  const float d = load_f16(block + 208);
  for (int g = 0; g < 16; ++g) scales[g] = d * float(int8_t(block[192 + g]));
  unpack_two_bits(block + 128, codes);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 64; ++i) {
      uint8_t* low = codes + half * 128 + i;
      const uint8_t packed = block[half * 64 + i];
      low[0] = uint8_t(low[0] << 4 | (packed & 0x0f));
      low[64] = uint8_t(low[64] << 4 | packed >> 4);
    }
}

}  // namespace setpoint
