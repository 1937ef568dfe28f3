// Q5_0: f16 d, 32 fifth bits, 16 bytes of nibbles; w = d * (code - 16).
// Q5_1: f16 d, f16 m, 32 fifth bits, nibbles; w = d * code + m.   Bit i belongs to element i; nibbles as in Q4_0.
#pragma once
#include "quant/q4.h"

namespace setpoint {

// Bit i of `bits` to bit 4 of byte i.
inline uint64_t spread_fifth_bits(uint8_t bits) {
  const uint64_t alone = (bits * 0x0101010101010101u) & 0x8040201008040201u;  // byte i keeps bit i
  return ((alone + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u) << 4;     // any bit reaches bit 7, no carry leaves it
}

inline void unpack_q5_codes(const uint8_t* fifth_bits, const uint8_t* nibbles, uint8_t* codes) {
  unpack_nibbles_16(nibbles, codes);
  for (int i = 0; i < 4; ++i) {
    uint64_t eight;
    std::memcpy(&eight, codes + 8 * i, sizeof eight);
    eight |= spread_fifth_bits(fifth_bits[i]);
    std::memcpy(codes + 8 * i, &eight, sizeof eight);
  }
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
