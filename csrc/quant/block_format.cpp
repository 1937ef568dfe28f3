#include "quant/block_format.h"

#include "quant/half.h"
#include "quant/q2_k.h"
#include "quant/q3_k.h"
#include "quant/q4.h"
#include "quant/q4_k.h"
#include "quant/q5.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8.h"

#include <stdexcept>
#include <string>

namespace setpoint {
namespace {

constexpr ScaleType f16 = ScaleType::f16, sub8 = ScaleType::sub8;

// clang-format off
constexpr BlockFormat kFormats[] = {
    // name, elements, bytes, codes, scales, affine, zero point, group
    {"F32", 1, 4, Codes::f32, f16, false, 0, 0, nullptr},
    {"F16", 1, 2, Codes::f16, f16, false, 0, 0, nullptr},
    {"BF16", 1, 2, Codes::bf16, f16, false, 0, 0, nullptr},
    {"Q4_0", 32, 18, Codes::u4, f16, false, 8, 32, unpack_q4_0},
    {"Q4_1", 32, 20, Codes::u4, f16, true, 0, 32, unpack_q4_1},
    {"Q5_0", 32, 22, Codes::u5, f16, false, 16, 32, unpack_q5_0},
    {"Q5_1", 32, 24, Codes::u5, f16, true, 0, 32, unpack_q5_1},
    {"Q8_0", 32, 34, Codes::u8, f16, false, 128, 32, unpack_q8_0},
    {"Q2_K", 256, 84, Codes::u2, sub8, true, 0, 16, unpack_q2_k},
    {"Q3_K", 256, 110, Codes::u3, sub8, false, 4, 16, unpack_q3_k},
    {"Q4_K", 256, 144, Codes::u4, sub8, true, 0, 32, unpack_q4_k},
    {"Q5_K", 256, 176, Codes::u5, sub8, true, 0, 32, unpack_q5_k},
    {"Q6_K", 256, 210, Codes::u6, sub8, false, 32, 16, unpack_q6_k},
};
// clang-format on

void dequantize_block(const BlockFormat& format, const uint8_t* raw, float* out) {
  UnpackedBlock block;
  format.unpack(raw, block);
  for (int g = 0; g < format.block_elements / format.group; ++g) {
    const bool subs = format.scale_type == ScaleType::sub8;
    const float scale = f16_to_f32(block.scale) * (subs ? float(block.sub_scales[g]) : 1.f);
    const float min = format.affine ? f16_to_f32(block.min) * (subs ? float(block.sub_mins[g]) : 1.f) : 0.f;
    for (int i = g * format.group; i < (g + 1) * format.group; ++i)
      out[i] = format.affine ? scale * float(block.codes[i]) + min : scale * float(block.codes[i] - format.zero_point);
  }
}

}  // namespace

const BlockFormat& block_format(std::string_view name) {
  for (const BlockFormat& format : kFormats)
    if (name == format.name) return format;
  throw std::invalid_argument("unknown weight format '" + std::string(name) + "'");
}

size_t bytes_per_row(const BlockFormat& format, int64_t cols) {
  if (cols <= 0 || cols > INT32_MAX || cols % format.block_elements != 0)
    throw std::invalid_argument(std::to_string(cols) + " columns are not whole " + format.name + " blocks of " +
                                std::to_string(format.block_elements));
  return size_t(cols / format.block_elements) * size_t(format.block_bytes);
}

void dequantize_blocks(const BlockFormat& format, const uint8_t* raw, int64_t count, float* out) {
  switch (format.codes) {
    case Codes::f32:
      std::memcpy(out, raw, size_t(count) * sizeof(float));
      return;
    case Codes::f16:
      for (int64_t i = 0; i < count; ++i) out[i] = load_f16(raw + 2 * i);
      return;
    case Codes::bf16:
      for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_f32(load_u16(raw + 2 * i));
      return;
    default:
      break;
  }
  for (int64_t i = 0; i < count; i += format.block_elements, raw += format.block_bytes) dequantize_block(format, raw, out + i);
}

void dequantize_rows(const BlockFormat& format, const uint8_t* raw, size_t raw_size, int64_t rows, int64_t cols, const int32_t* ids,
                     size_t num_ids, float* out) {
  const size_t row_bytes = bytes_per_row(format, cols);
  if (rows < 0 || raw_size / row_bytes != size_t(rows) || raw_size % row_bytes != 0)
    throw std::invalid_argument("the raw size does not match " + std::to_string(rows) + " rows of " + format.name);
  for (size_t i = 0; i < num_ids; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) throw std::invalid_argument("row id " + std::to_string(ids[i]) + " is out of range");
    dequantize_blocks(format, raw + size_t(ids[i]) * row_bytes, cols, out + i * size_t(cols));
  }
}

}  // namespace setpoint
