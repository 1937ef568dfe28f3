// Where the codes and scales of a quantized PackedWeight lie. A panel of 16 channels is one linear stream of records.
//
// A step is 32 inputs of a panel. Its codes are planes, each a run of 64-byte lines [16 channels][4 bytes]:
//   bytes    8 lines; line l, byte b: input 4 l + b
//   nibbles  4 lines; line l, byte b: input 8 l + b in the low half, 8 l + 4 + b in the high half
//   pairs    2 lines; line l, byte b, bits 2 j and 2 j + 1: input 16 l + 4 j + b
//   bits     1 line;  byte b, bit j: input 4 j + b
//   u8 = bytes | u6 = nibbles, pairs << 4 | u5 = nibbles, bits << 4 | u4 = nibbles | u3 = pairs, bits << 2 | u2 = pairs
// So the codes of inputs 4 q .. 4 q + 3 are one vector: a line, shifted and masked.
//
// A record is its scales, then its steps. With f16 scales it has two steps:
//   scales f16 [2][16], if affine mins f16 [2][16]
// and with sub8 scales eight (256 inputs):
//   scale f16 [16], min f16 [16] (zeros if symmetric), sub-scales s8 [256 / group][16], if affine sub-mins s8 [256 / group][16]
// An odd number of steps leaves the second step of the last f16 record zero.
#pragma once
#include "kernels/kernels.h"

namespace setpoint {

// Internal linkage: x86 units may not share functions (kernels.h).
static constexpr int kStepInputs = 32;
static constexpr int kLineBytes = 64;

static constexpr int step_bytes(Codes codes) {
  constexpr int lines[] = {0, 0, 0, 2, 3, 4, 5, 6, 8};
  return lines[int(codes)] * kLineBytes;
}

static constexpr int steps_per_record(ScaleType type) { return type == ScaleType::f16 ? 2 : 8; }

static constexpr int scale_block_bytes(ScaleType type, bool affine, int group) {
  if (type == ScaleType::f16) return affine ? 2 * kLineBytes : kLineBytes;
  return kLineBytes + 256 / group * 16 * (affine ? 2 : 1);
}

static constexpr int record_bytes(Codes codes, ScaleType type, bool affine, int group) {
  return scale_block_bytes(type, affine, group) + steps_per_record(type) * step_bytes(codes);
}

static constexpr size_t panel_bytes(const PackedWeight& w) {
  const int steps = w.k / kStepInputs, per_record = steps_per_record(w.scale_type);
  return size_t((steps + per_record - 1) / per_record) * size_t(record_bytes(w.codes, w.scale_type, w.affine, w.group));
}

}  // namespace setpoint
