// Q6_K, 256 weights: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, f16 d.
// w = d * scale * (code - 32), one scale per 16 weights; 64 bytes hold 64 low, then 64 high nibbles.
#pragma once
#include "quant/q2_k.h"

namespace setpoint {

inline void unpack_q6_k(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block + 208);
  std::memcpy(out.sub_scales, block + 192, 16);
  unpack_two_bits(block + 128, out.codes);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 64; ++i) {
      uint8_t* low = out.codes + half * 128 + i;
      const uint8_t packed = block[half * 64 + i];
      low[0] = uint8_t(low[0] << 4 | (packed & 0x0f));
      low[64] = uint8_t(low[64] << 4 | packed >> 4);
    }
}

}  // namespace setpoint
