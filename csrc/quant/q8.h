// Q8_0: f16 d, 32 signed bytes; w = d * s. Packed as unsigned s + 128, because the dot product is unsigned x signed.
#pragma once
#include "quant/unpacked_block.h"

namespace setpoint {

inline void unpack_q8_0(const uint8_t* block, UnpackedBlock& out) {
  out.scale = load_u16(block);
  for (int i = 0; i < 32; ++i) out.codes[i] = block[2 + i] ^ 0x80;
}

}  // namespace setpoint
