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

// Quantized rows of k inputs (QuantizedRows' layout).
struct QuantizedActivations {
  QuantizedActivations() = default;
  QuantizedActivations(int rows, int k);
  // Columns [column, column + n) of some rows, both multiples of 32; x points at the first of them.
  void quantize(const KernelTable& kernels, const float* x, size_t x_stride, int begin, int rows, int column, int n);
  // x -= what row `row` stands for: the part that quantizing rounded away.
  void subtract_from(float* x, int row) const;
  QuantizedRows view() const { return {codes.data(), scales.data(), sums.data()}; }
  int k = 0;
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

// A slot's values and, where matmuls read them as 8-bit integers, those.
struct Slot {
  FloatRows values;
  QuantizedActivations quantized;
};

// Rows up to which every thread computes a stage's inputs for itself: that takes less time than to wait for another
// thread's part of them.
constexpr int kPrivateRows = 4;

struct Workspace {
  FloatRows& values(int slot) { return slots[static_cast<size_t>(slot)].values; }

  std::vector<Slot> slots;
  std::vector<std::vector<Slot>> private_slots;  // [thread][slot]: kPrivateRows rows, where any stage wants them
  std::vector<RopeTable> ropes;
  std::vector<MappedArray<float>> attention_scratch;  // per thread
  MappedArray<float> partials;                        // of one layer's splits, until they are merged
};

}  // namespace setpoint
