// A weight matrix repacked into the layout of kernels.h, with the storage it lives in.
#pragma once
#include "core/memory.h"
#include "kernels/kernels.h"
#include "quant/block_format.h"

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

namespace setpoint {

// Contiguous rows of one stored tensor.
struct RawRows {
  const BlockFormat* format = nullptr;
  const uint8_t* data = nullptr;
  size_t size = 0;  // bytes; must be rows * bytes_per_row
  int64_t rows = 0;
};

// Raise it whenever the same source would pack into other bytes: caches of packed weights are keyed by it.
constexpr uint32_t kPackedLayoutVersion = 1;

// What `sources`, stacked row by row, pack into: a weight without data. `as_float`: float32 panels of any formats mixed;
// otherwise all must become the same packed layout. Throws std::invalid_argument for whatever could not be packed.
PackedWeight packed_shape(std::span<const RawRows> sources, int64_t cols, bool as_float);
// Of the data of such a weight.
size_t packed_bytes(const PackedWeight& shape);
// Repacks panels [begin, end) of the sources into `data`, which is that of the whole matrix and starts as zeros.
void pack_panels(const PackedWeight& shape, std::span<const RawRows> sources, int begin, int end, uint8_t* data);

class PackedMatrix {
 public:
  // Stacks the sources row by row (q, k and v; gate and up) and repacks their codes and scales without loss.
  // All sources must become the same packed layout. Throws std::invalid_argument before allocating anything.
  static PackedMatrix pack(std::span<const RawRows> sources, int64_t cols);
  // The same rows as float32 panels: any formats, mixed as you like. For the float reference program.
  static PackedMatrix pack_dequantized(std::span<const RawRows> sources, int64_t cols);

  // A matrix whose data lie in `storage`, shared with others: packed later (weight_store.h).
  PackedMatrix(const PackedWeight& weight, std::shared_ptr<const MappedArray<uint8_t>> storage)
      : weight_(weight), storage_(std::move(storage)) {}

  const PackedWeight& weight() const { return weight_; }
  size_t num_bytes() const { return packed_bytes(weight_); }

 private:
  static PackedMatrix packed(PackedWeight shape, std::span<const RawRows> sources);

  PackedWeight weight_;
  std::shared_ptr<const MappedArray<uint8_t>> storage_;
};

}  // namespace setpoint
