// One stored block taken apart: what every unpack function fills, and packing and dequantizing read.
#pragma once
#include "quant/half.h"

#include <cstdint>

namespace setpoint {

constexpr int kMaxBlockElements = 256;
constexpr int kMaxBlockGroups = 16;

struct UnpackedBlock {
  uint8_t codes[kMaxBlockElements];  // in order of K
  // f16 bits. Of the block's only group, or (ScaleType::sub8) what the sub-scales and sub-mins multiply.
  uint16_t scale, min;
  int8_t sub_scales[kMaxBlockGroups], sub_mins[kMaxBlockGroups];
};

// The stored f16 of a minimum that is subtracted.
inline uint16_t negated_f16(const uint8_t* at) { return uint16_t(load_u16(at) ^ 0x8000); }

}  // namespace setpoint
