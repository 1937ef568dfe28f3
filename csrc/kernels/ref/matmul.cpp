// The readable truth of the matmul contract: plain loops in exactly the order that kernels.h states.
#include "kernels/kernels.h"
#include "kernels/packed_layout.h"
#include "kernels/ref/quantize_rows.h"
#include "quant/half.h"

#include <algorithm>
#include <cmath>

namespace setpoint {
namespace {

constexpr int kFloatBlock = 64;  // inputs summed by themselves before they join the output

// The record that holds input k of a channel's panel.
const uint8_t* record_at(const PackedWeight& w, int channel, int k) {
  const size_t record = size_t(k / (steps_per_record(w.scale_type) * kStepInputs));
  return w.data + size_t(channel / 16) * panel_bytes(w) + record * size_t(record_bytes(w.codes, w.scale_type, w.affine, w.group));
}

int code_at(const PackedWeight& w, int channel, int k) {
  const uint8_t* step = record_at(w, channel, k) + scale_block_bytes(w.scale_type, w.affine, w.group) +
                        k / kStepInputs % steps_per_record(w.scale_type) * step_bytes(w.codes);
  const int i = k % kStepInputs, at = channel % 16 * 4 + i % 4;  // within a line
  auto nibble = [&] { return step[i / 8 * kLineBytes + at] >> (i % 8 / 4 * 4) & 15; };
  auto pair = [&](int first_line) { return step[(first_line + i / 16) * kLineBytes + at] >> (i % 16 / 4 * 2) & 3; };
  auto bit = [&](int line) { return step[line * kLineBytes + at] >> (i / 4) & 1; };
  switch (w.codes) {
    case Codes::u2:
      return pair(0);
    case Codes::u3:
      return pair(0) | bit(2) << 2;
    case Codes::u4:
      return nibble();
    case Codes::u5:
      return nibble() | bit(4) << 4;
    case Codes::u6:
      return nibble() | pair(4) << 4;
    default:
      return step[i / 4 * kLineBytes + at];
  }
}

// The scale (which = 0) or the minimum (1) of group g.
float group_value(const PackedWeight& w, int which, int channel, int g) {
  const uint8_t* record = record_at(w, channel, g * w.group);
  const int lane = channel % 16;
  if (w.scale_type == ScaleType::f16) return load_f16(record + which * kLineBytes + (g % 2 * 16 + lane) * 2);
  const int groups = 256 / w.group;
  const int8_t sub = int8_t(record[kLineBytes + (which * groups + g % groups) * 16 + lane]);
  return load_f16(record + which * 32 + lane * 2) * float(sub);
}

float float_weight(const PackedWeight& w, int channel, int k) {
  const size_t index = (size_t(channel / 16) * w.k + k) * 16 + channel % 16;
  const uint8_t* at = w.data + index * (w.codes == Codes::f32 ? 4 : 2);
  if (w.codes == Codes::f16) return f16_to_f32(load_u16(at));
  if (w.codes == Codes::bf16) return bf16_to_f32(load_u16(at));
  float value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

float quantized_dot(const MatmulArgs& a, const QuantizedRows& q, int row, int channel) {
  const PackedWeight& w = *a.weight;
  const int8_t* codes = q.codes + size_t(row) * w.k;
  const float* scales = q.scales + size_t(row) * (w.k / 32);
  const int32_t* sums = q.sums + size_t(row) * (w.k / 16);
  float y = 0;
  for (int g = 0; g < w.k / w.group; ++g) {
    const int begin = g * w.group;
    int32_t acc = 0, sum = 0;
    for (int k = begin; k < begin + w.group; ++k) acc += code_at(w, channel, k) * codes[k];
    for (int k = begin; k < begin + w.group; k += 16) sum += sums[k / 16];
    const float activation = scales[begin / 32];
    const float scale = group_value(w, 0, channel, g) * activation;
    if (w.affine) {
      y = std::fma(float(acc), scale, y);
      y = std::fma(group_value(w, 1, channel, g), activation * float(sum), y);
    } else {
      y = std::fma(float(acc - w.zero_point * sum), scale, y);
    }
  }
  return y;
}

float float_dot(const MatmulArgs& a, const QuantizedRows&, int row, int channel) {
  const PackedWeight& w = *a.weight;
  const float* x = a.x + size_t(row) * a.x_stride;
  float y = 0;
  for (int begin = 0; begin < w.k; begin += kFloatBlock) {
    float block = 0;
    for (int k = begin; k < std::min(begin + kFloatBlock, w.k); ++k) block = std::fma(x[k], float_weight(w, channel, k), block);
    y = y + block;
  }
  return y;
}

template <float (*dot)(const MatmulArgs&, const QuantizedRows&, int row, int channel)>
void matmul(const MatmulArgs& a) {
  const int channel_end = std::min(a.panel_end * 16, a.weight->n);
  for (int row = a.row_begin; row < a.row_end; ++row) {
    float* out = a.out + size_t(row) * a.out_stride;
    for (int channel = a.panel_begin * 16; channel < channel_end; ++channel) {
      float y = dot(a, a.q, row, channel);
      if (a.bias != nullptr) y = y + a.bias[channel];
      if (a.accumulate) y = y + out[channel];
      if (a.fine.codes != nullptr) y = dot(a, a.fine, row, channel) + y;
      out[channel] = y;
    }
  }
}

}  // namespace

void register_ref_matmul(KernelTable& t) {
  t.matmul_quantized = matmul<quantized_dot>;
  t.matmul_float = matmul<float_dot>;
  register_ref_quantize(t);
}

}  // namespace setpoint
