// A weight matrix repacked into the layout of kernels.h, with the storage it lives in.
#pragma once
#include "core/memory.h"
#include "kernels/kernels.h"
#include "quant/block_format.h"

#include <cstdint>
#include <span>

namespace setpoint {

// Contiguous rows of one stored tensor.
struct RawRows {
  const BlockFormat* format = nullptr;
  const uint8_t* data = nullptr;
  size_t size = 0;  // bytes; must be rows * bytes_per_row
  int64_t rows = 0;
};

class PackedMatrix {
 public:
  // Stacks the sources row by row (q, k and v; gate and up) and repacks their codes and scales without loss.
  // All sources must become the same packed layout. Throws std::invalid_argument before allocating anything.
  static PackedMatrix pack(std::span<const RawRows> sources, int64_t cols);
  // The same rows as float32 panels: any formats, mixed as you like. For the float reference program.
  static PackedMatrix pack_dequantized(std::span<const RawRows> sources, int64_t cols);

  PackedMatrix(PackedMatrix&&) noexcept = default;
  PackedMatrix& operator=(PackedMatrix&&) noexcept = default;

  const PackedWeight& weight() const { return weight_; }
  size_t num_bytes() const { return storage_.size(); }

 private:
  PackedMatrix(const BlockFormat& layout, int64_t rows, int64_t cols);

  PackedWeight weight_;
  MappedArray<uint8_t> storage_;
};

}  // namespace setpoint
