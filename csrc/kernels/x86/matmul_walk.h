// The walk over panels, rows and K that the x86 matmuls share; each ISA brings its register tiles.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/kernels.h"

namespace setpoint {
namespace {

constexpr int kLanes = 16;     // channels of a panel
constexpr int kRowBlock = 32;  // rows whose running outputs stay in L1 while a weight block is used
constexpr int kMaxTilePanels = 4;
constexpr int kTileStride = kMaxTilePanels * kLanes;
constexpr int kMaxChunkGroups = 64;

inline int smaller(int a, int b) { return a < b ? a : b; }

// One register tile's work: `groups` groups of K for some rows and panels, added to the running outputs y.
struct Tile {
  const uint8_t* data;  // first group of the first panel
  size_t data_stride;   // bytes from panel to panel
  const uint8_t* scales;
  const uint8_t* mins;
  size_t scale_stride;  // bytes from panel to panel, scales and mins alike
  bool half_scales;     // f16 instead of f32
  int groups;
  const int8_t* x;  // codes of the first row, first group
  size_t x_stride;
  const float* a;  // activation scales
  size_t a_stride;
  const int32_t* offset;  // [row][kMaxChunkGroups] -zero_point * sum        (symmetric)
  const float* a_sum;     // [row][kMaxChunkGroups] a * float(sum)           (affine)
  float* y;               // [row][kTileStride]
  const uint8_t* ahead;   // what to prefetch, `ahead_lines` per group
  int ahead_lines;
};

// What of the activations enters each group besides the dot product, for a block of rows and a chunk of groups.
union SumTerms {
  int32_t offset[kRowBlock][kMaxChunkGroups];
  float a_sum[kRowBlock][kMaxChunkGroups];
};

void fill_sum_terms(SumTerms& terms, const MatmulArgs& m, int row_begin, int rows, int group_begin, int groups) {
  const PackedWeight& w = *m.weight;
  for (int r = 0; r < rows; ++r) {
    const size_t row = size_t(row_begin + r);
    const int32_t* sums = m.q.sums + row * size_t(w.k / 16) + group_begin * (w.group / 16);
    const float* a = m.q.scales + row * size_t(w.k / 32) + group_begin * w.group / 32;
    int32_t* offset = terms.offset[r];
    float* a_sum = terms.a_sum[r];
    const int32_t minus_zero = -w.zero_point;
    if (w.group == 32) {
      if (w.affine)
        for (int g = 0; g < groups; ++g) a_sum[g] = a[g] * float(sums[2 * g] + sums[2 * g + 1]);
      else
        for (int g = 0; g < groups; ++g) offset[g] = minus_zero * (sums[2 * g] + sums[2 * g + 1]);
    } else {
      if (w.affine)
        for (int g = 0; g < groups; ++g) a_sum[g] = a[g / 2] * float(sums[g]);
      else
        for (int g = 0; g < groups; ++g) offset[g] = minus_zero * sums[g];
    }
  }
}

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

// Memory the next block of panels will read, fetched into L2 little by little while this one computes: the hardware
// prefetcher stops where a block is used for several row tiles.
struct Ahead {
  struct Region {
    const uint8_t* at;
    const uint8_t* end;
  } regions[3];
  int region;
  int lines;  // per group of each tile

  void start(const PackedWeight& w, int panel, int panels, size_t data_stride, size_t scale_stride, int tiles, int groups) {
    const uint8_t* bases[3] = {w.data, static_cast<const uint8_t*>(w.scales), static_cast<const uint8_t*>(w.mins)};
    size_t total = 0;
    for (int i = 0; i < 3; ++i) {
      const size_t stride = bases[i] == nullptr ? 0 : i == 0 ? data_stride : scale_stride;
      regions[i] = {bases[i] + size_t(panel) * stride, bases[i] + size_t(panel + panels) * stride};
      total += stride * size_t(panels);
    }
    region = 0;
    const size_t steps = size_t(tiles) * size_t(groups);
    lines = int((total / 64 + steps - 1) / steps);
  }

  void feed(Tile& t) {
    while (region < 3 && regions[region].at >= regions[region].end) ++region;
    t.ahead_lines = region < 3 ? lines : 0;
    if (region == 3) return;
    t.ahead = regions[region].at;
    regions[region].at += size_t(lines) * 64 * size_t(t.groups);
  }
};

// Ops::run<Rows, Panels>(tile): a register tile. Ops::kTileRows: the most rows of one. Ops::panels(rows): how wide.
template <class Ops>
void walk_rows(Tile tile, Ahead& ahead, int panels, int rows) {
  for (int r = 0; r < rows; r += Ops::kTileRows) {
    ahead.feed(tile);
    Ops::run(tile, smaller(Ops::kTileRows, rows - r), panels);
    tile.x += Ops::kTileRows * tile.x_stride;
    tile.a += Ops::kTileRows * tile.a_stride;
    tile.offset += Ops::kTileRows * kMaxChunkGroups;
    tile.a_sum += Ops::kTileRows * kMaxChunkGroups;
    tile.y += Ops::kTileRows * kTileStride;
  }
}

// Groups per chunk of K: all that fit when one tile covers the rows, else so few that the chunk of weights stays
// in L1 while the row tiles take turns. Float steps stay in ascending order either way.
template <class Ops>
int chunk_groups(const PackedWeight& w, int panels, int rows) {
  const int group_bytes = w.codes == Codes::u4 ? w.group * kLanes / 2 : w.group * kLanes;
  int limit = rows <= Ops::kTileRows ? kMaxChunkGroups : Ops::kChunkBytes / (panels * group_bytes);
  limit = limit < 2 ? 2 : smaller(limit, kMaxChunkGroups) / 2 * 2;  // even: a group of 16 is half an activation group
  const int total = w.k / w.group;
  const int chunks = (total + limit - 1) / limit;
  return ((total + chunks - 1) / chunks + 1) / 2 * 2;
}

template <class Ops>
void walk_block(const MatmulArgs& m, Ahead& ahead, int panel_begin, int panels, int row_begin, int rows) {
  const PackedWeight& w = *m.weight;
  alignas(64) float y[kRowBlock][kTileStride];
  alignas(64) SumTerms terms;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < panels * kLanes; ++c) y[r][c] = 0;

  const int total = w.k / w.group;
  const size_t group_bytes = size_t(w.codes == Codes::u4 ? w.group * kLanes / 2 : w.group * kLanes);
  const size_t scale_bytes = kLanes * (w.scale_type == ScaleType::f16 ? 2 : 4);
  Tile tile{};
  tile.data_stride = size_t(total) * group_bytes;
  tile.scale_stride = size_t(total) * scale_bytes;
  tile.half_scales = w.scale_type == ScaleType::f16;
  tile.x_stride = size_t(w.k);
  tile.a_stride = size_t(w.k / 32);
  tile.offset = terms.offset[0];
  tile.a_sum = terms.a_sum[0];
  tile.y = y[0];

  const int step = chunk_groups<Ops>(w, panels, rows);
  for (int g = 0; g < total; g += step) {
    tile.groups = smaller(step, total - g);
    fill_sum_terms(terms, m, row_begin, rows, g, tile.groups);
    tile.data = w.data + size_t(panel_begin) * tile.data_stride + size_t(g) * group_bytes;
    const size_t scale_at = size_t(panel_begin) * tile.scale_stride + size_t(g) * scale_bytes;
    tile.scales = static_cast<const uint8_t*>(w.scales) + scale_at;
    tile.mins = w.affine ? static_cast<const uint8_t*>(w.mins) + scale_at : nullptr;
    tile.x = m.q.codes + size_t(row_begin) * tile.x_stride + size_t(g * w.group);
    tile.a = m.q.scales + size_t(row_begin) * tile.a_stride + size_t(g * w.group / 32);
    walk_rows<Ops>(tile, ahead, panels, rows);
  }
  const int channel_begin = panel_begin * kLanes;
  store_outputs(m, y, row_begin, rows, channel_begin, smaller(panels * kLanes, w.n - channel_begin));
}

// Panels outermost: a block of weights is read from memory once and serves all rows from the caches.
template <class Ops>
void walk(const MatmulArgs& m) {
  const PackedWeight& w = *m.weight;
  const int rows = m.row_end - m.row_begin;
  const int width = Ops::panels(rows);
  const int groups = w.k / w.group;
  const size_t data_stride = size_t(w.k) * kLanes / (w.codes == Codes::u4 ? 2 : 1);
  const size_t scale_stride = size_t(groups) * kLanes * (w.scale_type == ScaleType::f16 ? 2 : 4);
  Ahead ahead;
  for (int panel = m.panel_begin; panel < m.panel_end; panel += width) {
    const int panels = smaller(width, m.panel_end - panel);
    const int next = smaller(width, m.panel_end - panel - panels);
    ahead.start(w, panel + panels, next, data_stride, scale_stride, (rows + Ops::kTileRows - 1) / Ops::kTileRows, groups);
    for (int row = m.row_begin; row < m.row_end; row += kRowBlock)
      walk_block<Ops>(m, ahead, panel, panels, row, smaller(kRowBlock, m.row_end - row));
  }
}

}  // namespace
}  // namespace setpoint
