// The weight formats that can be read, one row each: their GGUF block layout and the packed layout they become.
#pragma once
#include "kernels/kernels.h"
#include "quant/unpacked_block.h"

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace setpoint {

struct BlockFormat {
  const char* name;
  int block_elements;
  int block_bytes;
  // The packed layout (kernels.h).
  Codes codes;
  ScaleType scale_type;
  bool affine;
  int zero_point;
  int group;
  void (*unpack)(const uint8_t* block, UnpackedBlock& out);  // null: float

  bool is_float() const { return unpack == nullptr; }
  bool packs_like(const BlockFormat& other) const {
    return codes == other.codes && scale_type == other.scale_type && affine == other.affine && zero_point == other.zero_point &&
           group == other.group;
  }
};

// "Q4_0", "F32", ... Throws std::invalid_argument naming the format when it is not in the table.
const BlockFormat& block_format(std::string_view name);

// Bytes of a row of `cols` weights. Throws std::invalid_argument when cols is not a positive number of whole blocks.
size_t bytes_per_row(const BlockFormat& format, int64_t cols);

// One row (or any run of whole blocks) to float32.
void dequantize_blocks(const BlockFormat& format, const uint8_t* raw, int64_t count, float* out);

// Rows `ids` of a matrix of `rows` x `cols` weights to out [num_ids, cols]: the embedding lookup.
// Throws std::invalid_argument when the size does not match or an id is out of range.
void dequantize_rows(const BlockFormat& format, const uint8_t* raw, size_t raw_size, int64_t rows, int64_t cols, const int32_t* ids,
                     size_t num_ids, float* out);

}  // namespace setpoint
