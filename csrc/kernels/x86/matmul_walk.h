// The walk over panels, rows and K that the x86 matmuls share; each ISA brings its register tiles.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/x86/packed_format.h"

namespace setpoint {
namespace {

constexpr int kLanes = 16;     // channels of a panel
constexpr int kRowBlock = 32;  // rows whose running outputs stay in L1 while a weight block is used
constexpr int kMaxTilePanels = 4;
constexpr int kTileStride = kMaxTilePanels * kLanes;
constexpr int kMaxTerms = 4096;  // (row, group) pairs of a chunk

inline int smaller(int a, int b) { return a < b ? a : b; }

// One register tile's work: some steps of K for some rows and panels, added to the running outputs y.
struct Tile {
  const uint8_t* data;  // first record of the first panel
  size_t panel_bytes;   // from panel to panel
  int steps;
  const int8_t* x;  // codes of the first row, first step
  size_t x_stride;
  const float* a;  // activation scales
  size_t a_stride;
  const int32_t* offset;  // [row][term_stride] -zero_point * sum        (symmetric)
  const float* a_sum;     // [row][term_stride] a * float(sum)           (affine)
  size_t term_stride;
  float* y;  // [row][kTileStride]
};

// What of the activations enters each group besides the dot product, for a block of rows and a chunk of K.
struct SumTerms {
  union {
    int32_t offset[kMaxTerms];
    float a_sum[kMaxTerms];
  };
  int row = -1, step = -1, num_steps = 0;  // what they are of

  void fill(const MatmulArgs& m, int row_begin, int rows, int step_begin, int steps) {
    if (row == row_begin && step == step_begin && num_steps == steps) return;
    row = row_begin;
    step = step_begin;
    num_steps = steps;
    const PackedWeight& w = *m.weight;
    for (int r = 0; r < rows; ++r) {
      const size_t at = size_t(row_begin + r) * size_t(w.k / kStepInputs) + size_t(step_begin);
      const size_t out = size_t(r) * size_t(steps) * size_t(kStepInputs / w.group);
      fill_row(w, m.q.sums + 2 * at, m.q.scales + at, steps, offset + out, a_sum + out);
    }
  }

 private:
  static void fill_row(const PackedWeight& w, const int32_t* sums, const float* a, int steps, int32_t* offset, float* a_sum) {
    const int32_t minus_zero = -w.zero_point;
    if (w.group == 32) {
      if (w.affine)
        for (int s = 0; s < steps; ++s) a_sum[s] = a[s] * float(sums[2 * s] + sums[2 * s + 1]);
      else
        for (int s = 0; s < steps; ++s) offset[s] = minus_zero * (sums[2 * s] + sums[2 * s + 1]);
    } else {
      if (w.affine)
        for (int g = 0; g < 2 * steps; ++g) a_sum[g] = a[g / 2] * float(sums[g]);
      else
        for (int g = 0; g < 2 * steps; ++g) offset[g] = minus_zero * sums[g];
    }
  }
};

void store_outputs(const MatmulArgs& m, const float (*y)[kTileStride], int row_begin, int rows, int channel_begin, int channels) {
  for (int r = 0; r < rows; ++r) {
    float* out = m.out + size_t(row_begin + r) * m.out_stride + channel_begin;
    for (int c = 0; c < channels; ++c) {
      float value = y[r][c];
      if (m.bias != nullptr) value = value + m.bias[channel_begin + c];
      if (m.accumulate) value = value + out[c];
      out[c] = value;
    }
  }
}

// Steps per chunk of K: all that fit when one tile covers the rows, else so few that the chunk of weights stays
// in L1 while the row tiles take turns. Float steps stay in ascending order either way.
template <class Ops>
int chunk_steps(const PackedWeight& w, int panels, int rows) {
  using Format = typename Ops::Format;
  int limit = kMaxTerms / rows / Format::kStepGroups;
  if (rows > Ops::kTileRows) limit = smaller(limit, Ops::kChunkBytes / (panels * Format::kStepBytes));
  limit = limit < Format::kSteps ? Format::kSteps : limit;
  const int total = w.k / kStepInputs, chunks = (total + limit - 1) / limit;
  return ((total + chunks - 1) / chunks + Format::kSteps - 1) / Format::kSteps * Format::kSteps;  // whole records
}

// Ops::run(tile, rows, panels): a register tile. Ops::kTileRows: the most rows of one. Ops::panels(rows): how wide.
template <class Ops>
void walk_rows(Tile tile, int panels, int rows) {
  for (int r = 0; r < rows; r += Ops::kTileRows) {
    Ops::run(tile, smaller(Ops::kTileRows, rows - r), panels);
    tile.x += Ops::kTileRows * tile.x_stride;
    tile.a += Ops::kTileRows * tile.a_stride;
    tile.offset += Ops::kTileRows * tile.term_stride;
    tile.a_sum += Ops::kTileRows * tile.term_stride;
    tile.y += Ops::kTileRows * kTileStride;
  }
}

template <class Ops>
void walk_block(const MatmulArgs& m, SumTerms& terms, int panel_begin, int panels, int row_begin, int rows) {
  using Format = typename Ops::Format;
  const PackedWeight& w = *m.weight;
  alignas(64) float y[kRowBlock][kTileStride];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < panels * kLanes; ++c) y[r][c] = 0;

  Tile tile{};
  tile.panel_bytes = panel_bytes(w);
  tile.x_stride = size_t(w.k);
  tile.a_stride = size_t(w.k / kStepInputs);
  tile.offset = terms.offset;
  tile.a_sum = terms.a_sum;
  tile.y = y[0];

  const int total = w.k / kStepInputs, chunk = chunk_steps<Ops>(w, panels, rows);
  for (int step = 0; step < total; step += chunk) {
    tile.steps = smaller(chunk, total - step);
    tile.term_stride = size_t(tile.steps * Format::kStepGroups);
    terms.fill(m, row_begin, rows, step, tile.steps);
    tile.data = w.data + size_t(panel_begin) * tile.panel_bytes + size_t(step / Format::kSteps) * Format::kRecordBytes;
    tile.x = m.q.codes + size_t(row_begin) * tile.x_stride + size_t(step * kStepInputs);
    tile.a = m.q.scales + size_t(row_begin) * tile.a_stride + size_t(step);
    walk_rows<Ops>(tile, panels, rows);
  }
  const int channel_begin = panel_begin * kLanes;
  store_outputs(m, y, row_begin, rows, channel_begin, smaller(panels * kLanes, w.n - channel_begin));
}

// Panels outermost: a block of weights is read from memory once and serves all rows from the caches.
template <class Ops>
void walk(const MatmulArgs& m) {
  const int width = Ops::panels(m.row_end - m.row_begin);
  alignas(64) SumTerms terms;
  for (int panel = m.panel_begin; panel < m.panel_end; panel += width) {
    const int panels = smaller(width, m.panel_end - panel);
    for (int row = m.row_begin; row < m.row_end; row += kRowBlock)
      walk_block<Ops>(m, terms, panel, panels, row, smaller(kRowBlock, m.row_end - row));
  }
}

// The format's walk, for Ops<Format>.
template <template <class> class Ops>
void matmul(const MatmulArgs& m) {
  visit_format(*m.weight, [&m](auto format) { walk<Ops<decltype(format)>>(m); });
}

}  // namespace
}  // namespace setpoint
