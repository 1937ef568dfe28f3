#include "quant/packed_matrix.h"

#include "kernels/packed_layout.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace setpoint {
namespace {

constexpr int kPanelChannels = 16;
// Bounds that keep every int and every product of sizes in range.
constexpr int64_t kMaxRows = int64_t(1) << 28;
constexpr int64_t kMaxCols = int64_t(1) << 24;

size_t float_bytes(Codes codes) { return codes == Codes::f32 ? 4 : 2; }

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

struct Target {  // the writable side of a PackedWeight
  const PackedWeight& weight;
  uint8_t* data;
};

constexpr int kMaxStepWords = 8;

// 32 codes of one channel as its dwords of a step's lines.
template <Codes kind>
void step_words(const uint8_t* codes, uint32_t* words) {
  uint32_t quads[8];  // 4 codes each
  std::memcpy(quads, codes, sizeof quads);
  constexpr uint32_t kNibble = 0x0f0f0f0f, kPair = 0x03030303, kBit = 0x01010101;
  if constexpr (kind == Codes::u8) std::memcpy(words, quads, sizeof quads);
  if constexpr (kind == Codes::u4 || kind == Codes::u5 || kind == Codes::u6)
    for (int i = 0; i < 4; ++i) *words++ = (quads[2 * i] & kNibble) | (quads[2 * i + 1] & kNibble) << 4;
  if constexpr (kind == Codes::u2 || kind == Codes::u3 || kind == Codes::u6)
    for (int i = 0; i < 2; ++i) {
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) word |= (quads[4 * i + j] >> (kind == Codes::u6 ? 4 : 0) & kPair) << (2 * j);
      *words++ = word;
    }
  if constexpr (kind == Codes::u3 || kind == Codes::u5) {
    uint32_t word = 0;
    for (int j = 0; j < 8; ++j) word |= (quads[j] >> (kind == Codes::u5 ? 4 : 2) & kBit) << j;
    *words = word;
  }
}

// Codes of whole steps of one channel into the lines of the channel's panel.
template <Codes kind>
void write_steps(const uint8_t* codes, int steps, uint8_t* out) {
  for (int s = 0; s < steps; ++s, codes += kStepInputs) {
    uint32_t words[kMaxStepWords];
    step_words<kind>(codes, words);
    for (int i = 0; i < step_bytes(kind) / kLineBytes; ++i, out += kLineBytes) std::memcpy(out, &words[i], 4);
  }
}

using WriteSteps = void (*)(const uint8_t* codes, int steps, uint8_t* out);
WriteSteps write_steps_of(Codes kind) {
  switch (kind) {
    case Codes::u2:
      return write_steps<Codes::u2>;
    case Codes::u3:
      return write_steps<Codes::u3>;
    case Codes::u4:
      return write_steps<Codes::u4>;
    case Codes::u5:
      return write_steps<Codes::u5>;
    case Codes::u6:
      return write_steps<Codes::u6>;
    default:
      return write_steps<Codes::u8>;
  }
}

void put_f16(uint8_t* at, uint16_t value) { std::memcpy(at, &value, sizeof value); }

void pack_quantized_row(const Target& t, const RawRow& row, int panel, int lane) {
  const PackedWeight& w = t.weight;
  const BlockFormat& format = *row.format;
  const bool subs = w.scale_type == ScaleType::sub8;
  const int record_steps = steps_per_record(w.scale_type), block_steps = format.block_elements / kStepInputs;
  const int step_size = step_bytes(w.codes), scale_size = scale_block_bytes(w.scale_type, w.affine, w.group);
  const int record_size = record_bytes(w.codes, w.scale_type, w.affine, w.group);
  const uint8_t* raw = row.data;
  uint8_t* const stream = t.data + size_t(panel) * panel_bytes(w);
  const WriteSteps write = write_steps_of(w.codes);
  UnpackedBlock block;
  for (int step = 0; step < w.k / kStepInputs; step += block_steps, raw += format.block_bytes) {
    format.unpack(raw, block);
    uint8_t* record = stream + size_t(step / record_steps) * size_t(record_size);
    const int within = step % record_steps;
    uint8_t* scale_at = subs ? record + lane * 2 : record + (within * kPanelChannels + lane) * 2;
    put_f16(scale_at, block.scale);
    if (w.affine) put_f16(scale_at + (subs ? 32 : kLineBytes), block.min);
    if (subs) {
      const int groups = format.block_elements / w.group;
      uint8_t* sub = record + kLineBytes + lane;
      for (int g = 0; g < groups; ++g, sub += kPanelChannels) *sub = uint8_t(block.sub_scales[g]);
      for (int g = 0; w.affine && g < groups; ++g, sub += kPanelChannels) *sub = uint8_t(block.sub_mins[g]);
    }
    write(block.codes, block_steps, record + scale_size + within * step_size + lane * 4);
  }
}

template <class Element>
void scatter(const uint8_t* from, uint8_t* to, int count) {
  for (int i = 0; i < count; ++i)
    std::memcpy(to + size_t(i) * kPanelChannels * sizeof(Element), from + size_t(i) * sizeof(Element), sizeof(Element));
}

// Inputs [k, k + count) of one channel, whole blocks, into float panels.
void pack_float_run(const Target& t, const RawRow& row, int panel, int lane, int k, int count) {
  const size_t width = float_bytes(t.weight.codes);
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

}  // namespace

PackedWeight packed_shape(std::span<const RawRows> sources, int64_t cols, bool as_float) {
  const int64_t rows = checked_rows(sources, cols);
  const BlockFormat& layout = as_float ? block_format("F32") : *sources.front().format;
  for (const RawRows& source : sources)
    if (!as_float && !layout.packs_like(*source.format))
      throw std::invalid_argument(std::string(layout.name) + " and " + source.format->name + " rows cannot share one packed matrix");
  PackedWeight shape;
  shape.codes = layout.codes;
  shape.scale_type = layout.scale_type;
  shape.affine = layout.affine;
  shape.zero_point = layout.zero_point;
  shape.group = layout.group;
  shape.n = int(rows);
  shape.k = int(cols);
  return shape;
}

size_t packed_bytes(const PackedWeight& shape) {
  // Both factors are bounded (checked_rows), and so is their product: 2^24 panels of at most 2^30 bytes.
  const size_t panel_size = shape.is_quantized() ? panel_bytes(shape) : size_t(shape.k) * kPanelChannels * float_bytes(shape.codes);
  return size_t(shape.panels()) * panel_size;
}

void pack_panels(const PackedWeight& shape, std::span<const RawRows> sources, int begin, int end, uint8_t* data) {
  for (int panel = begin; panel < end; ++panel) pack_panel({shape, data}, sources, panel);
}

PackedMatrix PackedMatrix::packed(PackedWeight shape, std::span<const RawRows> sources) {
  auto storage = std::make_shared<MappedArray<uint8_t>>(packed_bytes(shape));
  shape.data = storage->data();
  pack_panels(shape, sources, 0, shape.panels(), storage->data());
  return {shape, std::move(storage)};
}

PackedMatrix PackedMatrix::pack(std::span<const RawRows> sources, int64_t cols) {
  return packed(packed_shape(sources, cols, false), sources);
}

PackedMatrix PackedMatrix::pack_dequantized(std::span<const RawRows> sources, int64_t cols) {
  return packed(packed_shape(sources, cols, true), sources);
}

}  // namespace setpoint
