#include "quant/packed_matrix.h"

#include "quant/half.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace setpoint {
namespace {

constexpr int kPanelChannels = 16;
// Bounds that keep every int and every product of sizes in range.
constexpr int64_t kMaxRows = int64_t(1) << 28;
constexpr int64_t kMaxCols = int64_t(1) << 24;

size_t round_up(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }

size_t bytes_of_codes(Codes codes, size_t elements) {
  switch (codes) {
    case Codes::f32:
      return elements * 4;
    case Codes::f16:
    case Codes::bf16:
      return elements * 2;
    case Codes::u8:
      return elements;
    case Codes::u4:
      return elements / 2;
  }
  return 0;
}

int64_t checked_rows(std::span<const RawRows> sources, int64_t cols) {
  if (sources.empty()) throw std::invalid_argument("no rows to pack");
  if (cols > kMaxCols) throw std::invalid_argument("too many columns: " + std::to_string(cols));
  int64_t rows = 0;
  for (const RawRows& source : sources) {
    const size_t row_bytes = bytes_per_row(*source.format, cols);
    if (source.rows <= 0 || source.rows > kMaxRows || source.size != size_t(source.rows) * row_bytes)
      throw std::invalid_argument("the raw size does not match " + std::to_string(source.rows) + " rows of " + source.format->name);
    rows += source.rows;
    if (rows > kMaxRows) throw std::invalid_argument("too many rows to pack");
  }
  return rows;
}

// Row r of the stacked sources.
struct RawRow {
  const BlockFormat* format;
  const uint8_t* data;
};

RawRow find_row(std::span<const RawRows> sources, int64_t row, int64_t cols) {
  for (const RawRows& source : sources) {
    if (row < source.rows) return {source.format, source.data + size_t(row) * bytes_per_row(*source.format, cols)};
    row -= source.rows;
  }
  return {nullptr, nullptr};
}

void write_group_value(void* array, ScaleType type, size_t index, float value) {
  if (type == ScaleType::f32)
    static_cast<float*>(array)[index] = value;
  else
    static_cast<uint16_t*>(array)[index] = f32_to_f16(value);  // exact: the value came from an f16
}

struct Target {  // the writable side of a PackedWeight
  const PackedWeight& weight;
  uint8_t* data;
  uint8_t* scales;
  uint8_t* mins;
};

// Codes of one block of one channel: dwords of 4 codes (u8) or of 4 low and 4 high nibbles (u4), 64 bytes apart.
void write_codes(const Target& t, int panel, int lane, int k, const uint8_t* codes, int count) {
  if (t.weight.codes == Codes::u8) {
    uint8_t* out = t.data + (size_t(panel) * size_t(t.weight.k) + size_t(k)) * kPanelChannels + size_t(lane) * 4;
    for (int i = 0; i < count; i += 4, out += 64) std::memcpy(out, codes + i, 4);
    return;
  }
  uint8_t* out = t.data + (size_t(panel) * size_t(t.weight.k) + size_t(k)) / 2 * kPanelChannels + size_t(lane) * 4;
  for (int i = 0; i < count; i += 8, out += 64) {
    uint32_t low, high;
    std::memcpy(&low, codes + i, 4);
    std::memcpy(&high, codes + i + 4, 4);
    low |= high << 4;
    std::memcpy(out, &low, 4);
  }
}

void pack_quantized_row(const Target& t, const RawRow& row, int panel, int lane) {
  uint8_t codes[kMaxBlockElements];
  float scales[kMaxBlockGroups], mins[kMaxBlockGroups];
  const BlockFormat& format = *row.format;
  const size_t groups = size_t(t.weight.k / format.group);
  const uint8_t* block = row.data;
  for (int k = 0; k < t.weight.k; k += format.block_elements, block += format.block_bytes) {
    format.unpack(block, codes, scales, mins);
    write_codes(t, panel, lane, k, codes, format.block_elements);
    for (int g = 0; g < format.block_elements / format.group; ++g) {
      const size_t index = (size_t(panel) * groups + size_t(k / format.group + g)) * kPanelChannels + size_t(lane);
      write_group_value(t.scales, format.scale_type, index, scales[g]);
      if (format.affine) write_group_value(t.mins, format.scale_type, index, mins[g]);
    }
  }
}

template <class Element>
void scatter(const uint8_t* from, uint8_t* to, int count) {
  for (int i = 0; i < count; ++i)
    std::memcpy(to + size_t(i) * kPanelChannels * sizeof(Element), from + size_t(i) * sizeof(Element), sizeof(Element));
}

// Inputs [k, k + count) of one channel, whole blocks, into float panels.
void pack_float_run(const Target& t, const RawRow& row, int panel, int lane, int k, int count) {
  const size_t width = bytes_of_codes(t.weight.codes, 1);
  uint8_t* out = t.data + ((size_t(panel) * size_t(t.weight.k) + size_t(k)) * kPanelChannels + size_t(lane)) * width;
  const BlockFormat& format = *row.format;
  const uint8_t* raw = row.data + size_t(k / format.block_elements) * size_t(format.block_bytes);
  if (format.codes == t.weight.codes) {
    if (width == 4)
      scatter<float>(raw, out, count);
    else
      scatter<uint16_t>(raw, out, count);
    return;
  }
  float values[kMaxBlockElements];
  dequantize_blocks(format, raw, count, values);
  scatter<float>(reinterpret_cast<const uint8_t*>(values), out, count);
}

void pack_panel(const Target& t, std::span<const RawRows> sources, int panel) {
  // The storage starts as zeros, so the lanes past the last channel hold zero codes with zero scales.
  const int channels = std::min(kPanelChannels, t.weight.n - panel * kPanelChannels);
  RawRow rows[kPanelChannels];
  for (int lane = 0; lane < channels; ++lane) rows[lane] = find_row(sources, panel * kPanelChannels + lane, t.weight.k);
  if (t.weight.group > 0) {
    for (int lane = 0; lane < channels; ++lane) pack_quantized_row(t, rows[lane], panel, lane);
    return;
  }
  // All lanes of a run before the next run, while its 16 KiB of the panel are in L1.
  for (int k = 0; k < t.weight.k; k += kMaxBlockElements)
    for (int lane = 0; lane < channels; ++lane) pack_float_run(t, rows[lane], panel, lane, k, std::min(kMaxBlockElements, t.weight.k - k));
}

void pack_panels(const Target& t, std::span<const RawRows> sources) {
  constexpr int kChunk = 16;  // panels a thread takes at a time
  std::atomic<int> next{0};
  const int panels = t.weight.panels();
  auto work = [&] {
    for (int begin; (begin = next.fetch_add(kChunk)) < panels;)
      for (int panel = begin; panel < std::min(begin + kChunk, panels); ++panel) pack_panel(t, sources, panel);
  };
  const int extra = std::min(int(std::thread::hardware_concurrency()), (panels + kChunk - 1) / kChunk) - 1;
  std::vector<std::jthread> threads;
  for (int i = 0; i < std::min(extra, 15); ++i) threads.emplace_back(work);
  work();
}

Target target_of(const PackedWeight& w) {
  auto writable = [](const void* p) { return const_cast<uint8_t*>(static_cast<const uint8_t*>(p)); };
  return {w, writable(w.data), writable(w.scales), writable(w.mins)};
}

}  // namespace

PackedMatrix::PackedMatrix(const BlockFormat& layout, int64_t rows, int64_t cols) {
  weight_.codes = layout.codes;
  weight_.scale_type = layout.scale_type;
  weight_.affine = layout.affine;
  weight_.zero_point = layout.zero_point;
  weight_.group = layout.group;
  weight_.n = int(rows);
  weight_.k = int(cols);

  const size_t padded = size_t(weight_.panels()) * kPanelChannels;
  if (padded > std::numeric_limits<size_t>::max() / 8 / size_t(cols)) throw std::invalid_argument("matrix too large to pack");
  const size_t data_bytes = round_up(bytes_of_codes(layout.codes, padded * size_t(cols)), 64);
  const size_t groups = layout.group == 0 ? 0 : size_t(cols / layout.group);
  const size_t scale_bytes = round_up(padded * groups * (layout.scale_type == ScaleType::f32 ? 4 : 2), 64);
  storage_ = MappedArray<uint8_t>(data_bytes + scale_bytes * (layout.affine ? 2 : 1));
  weight_.data = storage_.data();
  if (groups > 0) weight_.scales = storage_.data() + data_bytes;
  if (layout.affine) weight_.mins = storage_.data() + data_bytes + scale_bytes;
}

PackedMatrix PackedMatrix::pack(std::span<const RawRows> sources, int64_t cols) {
  const int64_t rows = checked_rows(sources, cols);
  const BlockFormat& layout = *sources.front().format;
  for (const RawRows& source : sources)
    if (!layout.packs_like(*source.format))
      throw std::invalid_argument(std::string(layout.name) + " and " + source.format->name + " rows cannot share one packed matrix");
  PackedMatrix matrix(layout, rows, cols);
  pack_panels(target_of(matrix.weight_), sources);
  return matrix;
}

PackedMatrix PackedMatrix::pack_dequantized(std::span<const RawRows> sources, int64_t cols) {
  const int64_t rows = checked_rows(sources, cols);
  PackedMatrix matrix(block_format("F32"), rows, cols);
  pack_panels(target_of(matrix.weight_), sources);
  return matrix;
}

}  // namespace setpoint
