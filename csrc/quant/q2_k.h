// Q2_K, 256 weights: 16 bytes of (4-bit scale, 4-bit minimum) per 16, 64 bytes of 2-bit codes, f16 d, f16 dmin.
// w = d * scale * code - dmin * minimum.
#pragma once
#include "quant/unpacked_block.h"

namespace setpoint {

// Two-bit codes of Q2_K, Q3_K and the high bits of Q6_K: each 32 bytes hold 128 codes, bit pairs from low to high.
inline void unpack_two_bits(const uint8_t* packed, uint8_t* codes) {
  for (int half = 0; half < 2; ++half)
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 32; ++i) codes[half * 128 + pair * 32 + i] = packed[half * 32 + i] >> (2 * pair) & 3;
}

inline void unpack_q2_k(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block + 80);
  out.min = negated_f16(block + 82);
  for (int g = 0; g < 16; ++g) {
    out.sub_scales[g] = int8_t(block[g] & 0x0f);
    out.sub_mins[g] = int8_t(block[g] >> 4);
  }
  unpack_two_bits(block + 16, out.codes);
}

}  // namespace setpoint
