// The walk of the quantized matmul for many rows, shared by the ISAs: a chunk of K of a few panels is unpacked once
// into L1 (one byte a code, float scales and minimums, in the order the tile reads them), then every row tile passes
// over it. What the tiles cost does not depend on the weight's format; each ISA brings its unpacking and its tiles.
#pragma once
#include "kernels/x86/matmul_walk.h"

namespace setpoint {
namespace {

constexpr int kGemmRows = 256;        // rows of a block: what one unpacking serves
constexpr int kGemmPanels = 3;        // panels side by side in a tile, at most
constexpr int kGemmSums = 192 * 256;  // running outputs of a block, in L2: 12 panels of 256 rows, more of fewer
constexpr int kGemmGroups = 16;       // groups of a chunk of K, at most
constexpr int kGemmSteps = 12;        // steps of a chunk of K, at most: 18 KiB of codes in L1

// What of a row enters each group of a chunk besides its codes.
struct GemmRow {
  float a[kGemmGroups];  // activation scale
  union {
    int32_t offset[kGemmGroups];  // -zero_point * sum      (symmetric)
    float a_sum[kGemmGroups];     // a * float(sum)         (affine)
  };
};

// One register tile: `groups` groups of K for some rows and panels.
struct GemmTile {
  const uint8_t* weights;  // [group]{ [4 codes][panel] lines of codes; [panel] scales; [panel] minimums if affine }
  int groups;
  const int8_t* x;  // codes of the first row, first group
  size_t x_stride;
  const GemmRow* rows;
  float* y;          // [row][panel][16] between chunks of K
  bool first, last;  // chunk of K: start from zero; finish into `out`
  float* out;
  size_t out_stride;
  const float* bias;     // null: none
  bool accumulate;       // add to what out holds
  uint16_t last_lanes;   // channels of the last panel that exist
  const uint8_t* ahead;  // what to prefetch: `ahead_lines` a group, of each of kGemmPanels panels
  size_t ahead_stride;   // from panel to panel
  int ahead_lines;
};

struct GemmScratch {
  alignas(64) uint8_t weights[kGemmPanels * kGemmSteps * (8 + 4) * kLineBytes];  // at most 4 lines of scales a step
  alignas(64) GemmRow rows[kGemmRows];
  alignas(64) float y[kGemmSums];
};

// Steps a chunk: as few chunks as fit L1, of equal size.
template <class Format>
int gemm_chunk(int total) {
  const int limit = smaller(kGemmSteps, kGemmGroups / Format::kStepGroups);
  const int chunks = (total + limit - 1) / limit;
  return (total + chunks - 1) / chunks;
}

// The packed bytes of the chunk that is unpacked next, fetched into L2 while the tiles of this one compute: they come
// from memory, and the short runs of a chunk end before the hardware's prefetcher has caught on.
struct GemmAhead {
  const uint8_t* at;
  size_t lines;  // of each panel, still to fetch
  int per_group;

  template <class Format>
  static GemmAhead of(const PackedWeight& w, int panel, int step, int steps, int groups) {
    const int begin = step / Format::kSteps, end = (step + steps + Format::kSteps - 1) / Format::kSteps;
    const uint8_t* at = w.data + size_t(panel) * panel_bytes(w) + size_t(begin) * Format::kRecordBytes;
    const size_t lines = panel < w.panels() ? size_t(end - begin) * Format::kRecordBytes / kLineBytes : 0;
    return {at, lines, int((lines + size_t(groups) - 1) / size_t(groups))};
  }

  void feed(GemmTile& tile) {
    tile.ahead = at;
    tile.ahead_lines = lines > 0 ? per_group : 0;
    const size_t fed = size_t(tile.ahead_lines * tile.groups);
    at += fed * kLineBytes;
    lines = lines > fed ? lines - fed : 0;
  }
};

// Ops::tile_rows(panels): the most rows of a tile. Ops::run(tile, rows, panels).
template <class Ops>
void walk_gemm_rows(GemmTile tile, GemmAhead ahead, int rows, int panels) {
  const int step = Ops::tile_rows(panels);
  for (int r = 0; r < rows; r += step) {
    ahead.feed(tile);
    Ops::run(tile, smaller(step, rows - r), panels);
    tile.x += size_t(step) * tile.x_stride;
    tile.rows += step;
    tile.y += size_t(step) * size_t(panels) * kLanes;
    tile.out += size_t(step) * tile.out_stride;
  }
}

// Ops::fill_row(weight, steps, sums, a, to). Ops::unpack(panel, panel_bytes, panels, step, steps, to).
template <class Ops>
void walk_gemm_block(const MatmulArgs& m, GemmScratch& scratch, int row, int rows, int panel_begin, int panel_end) {
  using Format = typename Ops::Format;
  const PackedWeight& w = *m.weight;
  const int total = w.k / kStepInputs, chunk = gemm_chunk<Format>(total);
  GemmTile tile{};
  tile.weights = scratch.weights;
  tile.x_stride = size_t(w.k);
  tile.rows = scratch.rows;
  tile.out_stride = m.out_stride;
  tile.accumulate = m.accumulate;
  tile.ahead_stride = panel_bytes(w);
  for (int step = 0; step < total; step += chunk) {
    const int steps = smaller(chunk, total - step);
    tile.groups = steps * Format::kStepGroups;
    tile.x = m.q.codes + size_t(row) * tile.x_stride + size_t(step * kStepInputs);
    tile.first = step == 0;
    tile.last = step + steps == total;
    for (int r = 0; r < rows; ++r) {
      const size_t at = size_t(row + r) * size_t(total) + size_t(step);
      Ops::fill_row(w, steps, m.q.sums + 2 * at, m.q.scales + at, scratch.rows[r]);
    }
    for (int panel = panel_begin; panel < panel_end;) {
      const int left = panel_end - panel, panels = left == 4 ? 2 : smaller(kGemmPanels, left);
      const int missing = (panel + panels) * kLanes - w.n;
      Ops::unpack(w.data + size_t(panel) * panel_bytes(w), panel_bytes(w), panels, step, steps, scratch.weights);
      tile.y = scratch.y + size_t(panel - panel_begin) * size_t(rows) * kLanes;
      tile.out = m.out + size_t(row) * m.out_stride + panel * kLanes;
      tile.bias = m.bias == nullptr ? nullptr : m.bias + panel * kLanes;
      tile.last_lanes = uint16_t(0xffff >> (missing > 0 ? missing : 0));
      const bool ends = panel + panels >= panel_end;  // then the next chunk of K follows, or the next block of panels
      const int next_panel = ends && !tile.last ? panel_begin : panel + panels;
      const int next_step = !ends ? step : tile.last ? 0 : step + steps;
      const int tiles = (rows + Ops::tile_rows(panels) - 1) / Ops::tile_rows(panels);
      const GemmAhead ahead = GemmAhead::of<Format>(w, next_panel, next_step, smaller(chunk, total - next_step), tiles * tile.groups);
      walk_gemm_rows<Ops>(tile, ahead, rows, panels);
      panel += panels;
    }
  }
}

template <class Ops>
void walk_gemm(const MatmulArgs& m) {
  GemmScratch scratch;
  for (int row = m.row_begin; row < m.row_end; row += kGemmRows) {
    const int rows = smaller(kGemmRows, m.row_end - row);
    const int width = kGemmSums / (rows * kLanes) / kGemmPanels * kGemmPanels;
    for (int panel = m.panel_begin; panel < m.panel_end; panel += width)
      walk_gemm_block<Ops>(m, scratch, row, rows, panel, smaller(panel + width, m.panel_end));
  }
}

}  // namespace
}  // namespace setpoint
