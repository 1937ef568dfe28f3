// Q4_0: f16 d, 16 bytes of nibbles; w = d * (code - 8).   Q4_1: f16 d, f16 m, nibbles; w = d * code + m.
// Blocks of 32: low nibbles are elements 0..15, high nibbles 16..31.
#pragma once
#include "quant/unpacked_block.h"

namespace setpoint {

inline void unpack_nibbles_16(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = packed[i] & 0x0f;
    codes[i + 16] = packed[i] >> 4;
  }
}

inline void unpack_q4_0(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  unpack_nibbles_16(block + 2, out.codes);
}

inline void unpack_q4_1(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  out.min = load_u16(block + 2);
  unpack_nibbles_16(block + 4, out.codes);
}

}  // namespace setpoint
