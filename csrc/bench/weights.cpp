#include "bench/weights.h"

#include "bench/random.h"
#include "quant/half.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace setpoint::bench {
namespace {

constexpr int kDistinctRows = 320;

// Where a block of the format keeps its f16 scale and, if it has one, its f16 minimum.
std::vector<int> half_fields(std::string_view name) {
  if (name == "Q2_K") return {80, 82};
  if (name == "Q3_K") return {108};
  if (name == "Q6_K") return {208};
  if (name == "Q4_1" || name == "Q5_1" || name == "Q4_K" || name == "Q5_K") return {0, 2};
  return {0};
}

void put_half(uint8_t* at, float value) {
  const uint16_t half = f32_to_f16(value);
  std::memcpy(at, &half, sizeof half);
}

void fill_floats(const BlockFormat& format, std::vector<uint8_t>& raw, Random& random) {
  const size_t width = size_t(format.block_bytes);
  for (size_t at = 0; at < raw.size(); at += width) {
    const float value = random.symmetric();
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (format.codes == Codes::f16)
      put_half(raw.data() + at, value);
    else
      std::memcpy(raw.data() + at, reinterpret_cast<uint8_t*>(&bits) + (4 - width), width);  // bf16 is the upper half
  }
}

// Any codes, and scales of a size that weights have: no NaN, which would hide a difference.
std::vector<uint8_t> random_rows(const BlockFormat& format, int rows, int cols) {
  Random random(uint64_t(cols) * 31 + uint64_t(format.block_bytes));
  std::vector<uint8_t> raw(size_t(rows) * bytes_per_row(format, cols));
  if (format.is_float()) {
    fill_floats(format, raw, random);
    return raw;
  }
  random.fill(raw.data(), raw.size());
  for (size_t block = 0; block < raw.size(); block += size_t(format.block_bytes))
    for (int field : half_fields(format.name)) put_half(raw.data() + block + size_t(field), 0.02f * random.symmetric());
  return raw;
}

PackedMatrix random_matrix(const BlockFormat& format, int rows, int cols) {
  const int distinct = std::min(rows, kDistinctRows);
  const std::vector<uint8_t> raw = random_rows(format, distinct, cols);
  std::vector<RawRows> sources;
  for (int row = 0; row < rows; row += distinct) {
    const int count = std::min(distinct, rows - row);
    sources.push_back({&format, raw.data(), size_t(count) * bytes_per_row(format, cols), count});
  }
  return PackedMatrix::pack(sources, cols);
}

}  // namespace

Weights::Weights(const BlockFormat& format, int rows, int cols) : matrix_(random_matrix(format, rows, cols)), views_(1, matrix_.weight()) {}

void Weights::copy_until(size_t bytes) {
  if (views_.size() * matrix_.num_bytes() >= bytes) return;
  const size_t size = (matrix_.num_bytes() + 63) / 64 * 64, copies = bytes / size + 1;
  storage_ = MappedArray<uint8_t>(size * copies);
  views_.clear();
  for (size_t i = 0; i < copies; ++i) {
    std::memcpy(storage_.data() + i * size, matrix_.weight().data, matrix_.num_bytes());
    views_.push_back(matrix_.weight());
    views_.back().data = storage_.data() + i * size;
  }
}

std::shared_ptr<Weights> weights_of(const BlockFormat& format, int rows, int cols) {
  static std::shared_ptr<Weights> last;
  static const BlockFormat* last_format = nullptr;
  if (last == nullptr || last_format != &format || last->view().n != rows || last->view().k != cols) {
    last.reset();  // its memory first
    last = std::make_shared<Weights>(format, rows, cols);
    last_format = &format;
  }
  return last;
}

}  // namespace setpoint::bench
