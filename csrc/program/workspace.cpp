#include "program/workspace.h"

#include <cmath>

namespace setpoint {

FloatRows::FloatRows(int rows, int width)
    : width(width), stride((static_cast<size_t>(width) + 15) / 16 * 16 + 16), values(static_cast<size_t>(rows) * stride) {}

QuantizedActivations::QuantizedActivations(int rows, int k)
    : k(k),
      codes(static_cast<size_t>(rows) * static_cast<size_t>(k)),
      scales(static_cast<size_t>(rows) * static_cast<size_t>(k / 32)),
      sums(static_cast<size_t>(rows) * static_cast<size_t>(k / 16)) {}

void QuantizedActivations::quantize(const KernelTable& kernels, const float* x, size_t x_stride, int begin, int rows, int column, int n) {
  const size_t stride = static_cast<size_t>(k), first = static_cast<size_t>(begin) * stride + static_cast<size_t>(column);
  kernels.quantize_rows(x, x_stride, rows, n, codes.data() + first, scales.data() + first / 32, sums.data() + first / 16, stride);
}

void QuantizedActivations::subtract_from(float* x, int row) const {
  const size_t first = static_cast<size_t>(row) * static_cast<size_t>(k);
  for (int i = 0; i < k; ++i) {
    const size_t at = first + static_cast<size_t>(i);
    x[i] -= scales[at / 32] * static_cast<float>(codes[at]);
  }
}

RopeTable::RopeTable(int max_tokens, std::vector<float> inv_freq, float factor)
    : inv_freq(std::move(inv_freq)),
      factor(factor),
      cos(static_cast<size_t>(max_tokens) * this->inv_freq.size()),
      sin(static_cast<size_t>(max_tokens) * this->inv_freq.size()) {}

// The angle is a float product, as in Hugging Face's rotary embeddings; its
// cosine is taken in double, so that the result does not depend on the C
// library's float variants.
void RopeTable::fill(int row, int position) {
  const size_t first = static_cast<size_t>(row) * inv_freq.size();
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double angle = static_cast<double>(static_cast<float>(position) * inv_freq[i]);
    cos[first + i] = static_cast<float>(std::cos(angle)) * factor;
    sin[first + i] = static_cast<float>(std::sin(angle)) * factor;
  }
}

}  // namespace setpoint
