// Q4_K, 256 weights: f16 d, f16 dmin, 12 bytes of eight 6-bit scales and minimums, 128 bytes of nibbles.
// w = d * scale * code - dmin * minimum, one scale per 32 weights; 32 bytes hold 32 low, then 32 high nibbles.
#pragma once
#include "quant/unpacked_block.h"

namespace setpoint {

inline void unpack_k_scales(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  out.min = negated_f16(block + 2);
  const uint8_t* packed = block + 4;
  for (int g = 0; g < 4; ++g) {
    out.sub_scales[g] = int8_t(packed[g] & 63);
    out.sub_mins[g] = int8_t(packed[g + 4] & 63);
    out.sub_scales[g + 4] = int8_t((packed[g + 8] & 0x0f) | (packed[g] >> 6) << 4);
    out.sub_mins[g + 4] = int8_t(packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4);
  }
}

inline void unpack_nibbles_by_32(const uint8_t* packed, uint8_t* codes) {
  for (int chunk = 0; chunk < 4; ++chunk)
    for (int i = 0; i < 32; ++i) {
      codes[chunk * 64 + i] = packed[chunk * 32 + i] & 0x0f;
      codes[chunk * 64 + 32 + i] = packed[chunk * 32 + i] >> 4;
    }
}

inline void unpack_q4_k(const uint8_t* block, UnpackedBlock& out) {
  unpack_k_scales(block, out);
  unpack_nibbles_by_32(block + 16, out.codes);
}

}  // namespace setpoint
