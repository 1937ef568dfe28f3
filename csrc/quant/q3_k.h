// Q3_K, 256 weights: 32 bytes of third bits, 64 bytes of 2-bit codes, 12 bytes of sixteen 6-bit scales, f16 d.
// w = d * (scale - 32) * (code - 4), one scale per 16 weights.
#pragma once
#include "quant/q2_k.h"

namespace setpoint {

inline void unpack_q3_k(const uint8_t* block, UnpackedBlock& out) {
  const uint8_t* third_bits = block;
  const uint8_t* packed_scales = block + 96;
  out.scale = load_u16(block + 108);
  for (int g = 0; g < 16; ++g) {
    const int low = packed_scales[g % 8] >> (g < 8 ? 0 : 4) & 0x0f;
    const int high = packed_scales[8 + g % 4] >> (2 * (g / 4)) & 3;
    out.sub_scales[g] = int8_t((low | high << 4) - 32);
  }
  unpack_two_bits(block + 32, out.codes);
  for (int part = 0; part < 8; ++part)
    for (int i = 0; i < 32; ++i) out.codes[part * 32 + i] |= uint8_t((third_bits[i] >> part & 1) << 2);
}

}  // namespace setpoint
