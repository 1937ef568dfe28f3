// Q5_K, 256 weights: as Q4_K with 32 bytes of fifth bits before the nibbles; bit j of byte i is element 32 j + i.
#pragma once
#include "quant/q4_k.h"

namespace setpoint {

inline void unpack_q5_k(const uint8_t* block, UnpackedBlock& out) {
  unpack_k_scales(block, out);
  unpack_nibbles_by_32(block + 48, out.codes);
  for (int part = 0; part < 8; ++part)
    for (int i = 0; i < 32; ++i) out.codes[part * 32 + i] |= uint8_t((block[16 + i] >> part & 1) << 4);
}

}  // namespace setpoint
