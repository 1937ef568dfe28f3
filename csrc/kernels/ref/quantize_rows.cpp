// Activations to signed bytes, one scale per (row, 32 inputs): nothing but a row's own values enters its codes.
#include "kernels/ref/quantize_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace setpoint {
namespace {

constexpr int kGroup = 32;
constexpr uint32_t kInfinity = 0x7f800000;

// The largest magnitude, compared as bits: exact, in any order, and a NaN outranks everything.
float largest_magnitude(const float* x) {
  uint32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

// Not finite, or too small for a scale: codes of zero. The scale then still carries the NaN or infinity onwards.
bool has_codes(float scale) { return scale > 0 && std::bit_cast<uint32_t>(scale) < kInfinity; }

void quantize_group(const float* x, int8_t* codes, float* scale, int32_t* sums) {
  *scale = largest_magnitude(x) / 127.f;
  for (int half = 0; half < 2; ++half) {
    int32_t sum = 0;
    for (int i = half * 16; i < half * 16 + 16; ++i) {
      // The clamp matters only for subnormal scales, which are coarse.
      const float code = has_codes(*scale) ? std::clamp(std::nearbyint(x[i] / *scale), -127.f, 127.f) : 0.f;
      codes[i] = int8_t(code);
      sum += codes[i];
    }
    sums[half] = sum;
  }
}

void quantize_rows(const float* x, size_t x_stride, int rows, int n, int8_t* codes, float* scales, int32_t* sums, size_t out_k) {
  for (int row = 0; row < rows; ++row, x += x_stride, codes += out_k, scales += out_k / 32, sums += out_k / 16)
    for (int group = 0; group < n / kGroup; ++group)
      quantize_group(x + group * kGroup, codes + group * kGroup, scales + group, sums + 2 * group);
}

}  // namespace

void register_ref_quantize(KernelTable& t) { t.quantize_rows = quantize_rows; }

}  // namespace setpoint
