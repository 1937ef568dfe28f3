// Random weights of any format, packed as a model's are, in as many copies as it takes to keep them out of the caches:
// one after the other on huge pages, which a cold read needs to reach the speed of the memory.
#pragma once
#include <memory>
#include <vector>

#include "quant/packed_matrix.h"

namespace setpoint::bench {

class Weights {
 public:
  // Rows repeat after some hundreds: that is random enough for arithmetic, and quick to make.
  Weights(const BlockFormat& format, int rows, int cols);

  size_t bytes() const { return matrix_.num_bytes(); }
  const PackedWeight& view() const { return matrix_.weight(); }
  // Makes copies that together exceed `bytes`, unless they are there; `copy` counts through them again and again.
  void copy_until(size_t bytes);
  const PackedWeight& copy(size_t index) const { return views_[index % views_.size()]; }

 private:
  PackedMatrix matrix_;
  MappedArray<uint8_t> storage_;     // of all copies, on huge pages
  std::vector<PackedWeight> views_;  // of every copy, or of matrix_ alone
};

// The weights made last are kept: neighbouring cases share them.
std::shared_ptr<Weights> weights_of(const BlockFormat& format, int rows, int cols);

}  // namespace setpoint::bench
