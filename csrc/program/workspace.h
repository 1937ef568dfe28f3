// The buffers of a step, sized once for its largest batch.
#pragma once
#include <vector>

#include "core/memory.h"
#include "kernels/kernels.h"

namespace setpoint {

// f32 [rows][width], rows `stride` apart: a stride off the powers of two keeps
// rows out of each other's cache sets.
struct FloatRows {
  FloatRows() = default;
  FloatRows(int rows, int width);
  float* row(int i) { return values.data() + static_cast<size_t>(i) * stride; }
  int width = 0;
  size_t stride = 0;
  MappedArray<float> values;
};

// Quantized activations of one source at a time (QuantizedRows' layout).
struct QuantizedActivations {
  QuantizedActivations() = default;
  QuantizedActivations(int rows, int max_k);
  void quantize(const KernelTable& kernels, const float* x, size_t x_stride, int begin, int rows, int k);
  // x -= what row `row` stands for: the part that quantizing rounded away.
  void subtract_from(float* x, int row, int k) const;
  QuantizedRows view() const { return {codes.data(), scales.data(), sums.data()}; }
  MappedArray<int8_t> codes;
  MappedArray<float> scales;
  MappedArray<int32_t> sums;
};

// cos and sin of a rope's angles at the step's positions.
struct RopeTable {
  RopeTable(int max_tokens, std::vector<float> inv_freq, float factor);
  int half() const { return static_cast<int>(inv_freq.size()); }
  void fill(int row, int position);
  std::vector<float> inv_freq;
  float factor;
  MappedArray<float> cos, sin;  // [max_tokens][half]
};

struct Workspace {
  std::vector<FloatRows> slots;
  QuantizedActivations quantized;
  std::vector<RopeTable> ropes;
  std::vector<MappedArray<float>> attention_scratch;  // per thread
  std::vector<MappedArray<float>> split_scratch;      // per thread: one (tile, kv head, split) of partial
                                                      // results
  MappedArray<float> partials;                        // of one layer's splits, until they are merged
};

}  // namespace setpoint
