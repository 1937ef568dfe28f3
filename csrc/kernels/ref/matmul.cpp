// The readable truth of the matmul contract: plain loops in exactly the order that kernels.h states.
#include "kernels/kernels.h"
#include "kernels/ref/quantize_rows.h"
#include "quant/half.h"

#include <algorithm>
#include <cmath>

namespace setpoint {
namespace {

constexpr int kFloatBlock = 64;  // inputs summed by themselves before they join the output

int code_at(const PackedWeight& w, int channel, int k) {
  const int panel = channel / 16, lane = channel % 16;
  if (w.codes == Codes::u8) return w.data[((size_t(panel) * w.k + k) / 4 * 16 + lane) * 4 + k % 4];
  const uint8_t pair = w.data[((size_t(panel) * w.k + k) / 8 * 16 + lane) * 4 + k % 4];
  return k % 8 < 4 ? pair & 0x0f : pair >> 4;
}

float group_value(const PackedWeight& w, const void* values, int channel, int g) {
  const size_t index = (size_t(channel / 16) * (w.k / w.group) + g) * 16 + channel % 16;
  return w.scale_type == ScaleType::f32 ? static_cast<const float*>(values)[index]
                                        : f16_to_f32(static_cast<const uint16_t*>(values)[index]);
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

float quantized_dot(const MatmulArgs& a, int row, int channel) {
  const PackedWeight& w = *a.weight;
  const int8_t* codes = a.q.codes + size_t(row) * w.k;
  const float* scales = a.q.scales + size_t(row) * (w.k / 32);
  const int32_t* sums = a.q.sums + size_t(row) * (w.k / 16);
  float y = 0;
  for (int g = 0; g < w.k / w.group; ++g) {
    const int begin = g * w.group;
    int32_t acc = 0, sum = 0;
    for (int k = begin; k < begin + w.group; ++k) acc += code_at(w, channel, k) * codes[k];
    for (int k = begin; k < begin + w.group; k += 16) sum += sums[k / 16];
    const float activation = scales[begin / 32];
    const float scale = group_value(w, w.scales, channel, g) * activation;
    if (w.affine) {
      y = std::fma(float(acc), scale, y);
      y = std::fma(group_value(w, w.mins, channel, g), activation * float(sum), y);
    } else {
      y = std::fma(float(acc - w.zero_point * sum), scale, y);
    }
  }
  return y;
}

float float_dot(const MatmulArgs& a, int row, int channel) {
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

template <float (*dot)(const MatmulArgs&, int row, int channel)>
void matmul(const MatmulArgs& a) {
  const int channel_end = std::min(a.panel_end * 16, a.weight->n);
  for (int row = a.row_begin; row < a.row_end; ++row) {
    float* out = a.out + size_t(row) * a.out_stride;
    for (int channel = a.panel_begin * 16; channel < channel_end; ++channel) {
      float y = dot(a, row, channel);
      if (a.bias != nullptr) y = y + a.bias[channel];
      if (a.accumulate) y = y + out[channel];
      out[channel] = y;
    }
  }
}

}  // namespace

void register_ref_matmul(KernelTable& t) {
  t.matmul_u4 = matmul<quantized_dot>;
  t.matmul_u8 = matmul<quantized_dot>;
  t.matmul_float = matmul<float_dot>;
  register_ref_quantize(t);
}

}  // namespace setpoint
