// Q5_0: f16 d, 32 fifth bits, 16 bytes of nibbles; w = d * (code - 16).
// Q5_1: f16 d, f16 m, 32 fifth bits, nibbles; w = d * code + m.   Bit i belongs to element i; nibbles as in Q4_0.
#pragma once
#include "quant/q4.h"

namespace setpoint {

inline void unpack_q5_codes(const uint8_t* fifth_bits, const uint8_t* nibbles, uint8_t* codes) {
  unpack_nibbles_16(nibbles, codes);
  uint32_t bits;
  std::memcpy(&bits, fifth_bits, sizeof bits);
  for (int i = 0; i < 32; ++i) codes[i] |= uint8_t((bits >> i & 1) << 4);
}

inline void unpack_q5_0(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  unpack_q5_codes(block + 2, block + 6, out.codes);
}

inline void unpack_q5_1(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  out.min = load_u16(block + 2);
  unpack_q5_codes(block + 4, block + 8, out.codes);
}

}  // namespace setpoint
