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
void walk_gemm_rows(GemmTile tile, GemmAhead& ahead, int rows, int panels) {
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

// A block of rows and panels of a call.
struct GemmBlock {
  int row, rows, panel_begin, panel_end;
};

// Ops::fill_row(weight, steps, sums, a, to).
template <class Ops>
void fill_gemm_rows(const PackedWeight& w, const QuantizedRows& q, const GemmBlock& block, int step, int steps, GemmRow* to) {
  for (int r = 0; r < block.rows; ++r) {
    const size_t at = size_t(block.row + r) * size_t(w.k / kStepInputs) + size_t(step);
    Ops::fill_row(w, steps, q.sums + 2 * at, q.scales + at, to[r]);
  }
}

// Ops::unpack_quad<Quad>(step, to): 4 inputs, a line. Ops::unpack_scales(record, group, to, stride).
template <class Ops, int Quad, int QuadEnd>
[[gnu::always_inline]] inline void unpack_quads(const uint8_t* step, uint8_t* to, size_t stride) {
  if constexpr (Quad < QuadEnd) {
    Ops::template unpack_quad<Quad>(step, to);
    unpack_quads<Ops, Quad + 1, QuadEnd>(step, to + stride, stride);
  }
}

// The chunk's groups of one panel, to lines `stride` apart.
template <class Ops>
void unpack_panel(const uint8_t* panel, int step_begin, int steps, uint8_t* to, size_t stride) {
  using Format = typename Ops::Format;
  constexpr int kQuads = Format::kGroup / 4;
  constexpr size_t kGroupLines = kQuads + (Format::kAffine ? 2 : 1);
  for (int i = step_begin; i < step_begin + steps; ++i) {
    const uint8_t* record = panel + size_t(i / Format::kSteps) * Format::kRecordBytes;
    const uint8_t* codes = record + Format::kScaleBytes + i % Format::kSteps * Format::kStepBytes;
    const int group = i % Format::kSteps * Format::kStepGroups;
    unpack_quads<Ops, 0, kQuads>(codes, to, stride);
    Ops::unpack_scales(record, group, to + kQuads * stride, stride);
    to += kGroupLines * stride;
    if constexpr (Format::kStepGroups == 2) {
      unpack_quads<Ops, kQuads, 2 * kQuads>(codes, to, stride);
      Ops::unpack_scales(record, group + 1, to + kQuads * stride, stride);
      to += kGroupLines * stride;
    }
  }
}

// A chunk of K of all panels of the block.
template <class Ops>
void walk_gemm_chunk(const MatmulArgs& m, GemmScratch& scratch, const GemmBlock& block, int step, int chunk) {
  using Format = typename Ops::Format;
  const PackedWeight& w = *m.weight;
  const int total = w.k / kStepInputs, steps = smaller(chunk, total - step);
  const int planes = m.fine.codes == nullptr ? 1 : 2, rows = block.rows;
  GemmTile tile{};
  tile.weights = scratch.weights;
  tile.groups = steps * Format::kStepGroups;
  tile.x_stride = size_t(w.k);
  tile.first = step == 0;
  tile.last = step + steps == total;
  tile.out_stride = m.out_stride;
  tile.ahead_stride = panel_bytes(w);
  for (int panel = block.panel_begin; panel < block.panel_end;) {
    const int left = block.panel_end - panel, panels = left == 4 ? 2 : smaller(kGemmPanels, left);
    const int missing = (panel + panels) * kLanes - w.n;
    const bool ends = panels == left;  // then the next chunk of K follows, or the next block of panels
    const int next_panel = ends && !tile.last ? block.panel_begin : panel + panels;
    const int next_step = !ends ? step : tile.last ? 0 : step + steps;
    const int tiles = (rows + Ops::tile_rows(panels) - 1) / Ops::tile_rows(panels);
    GemmAhead ahead = GemmAhead::of<Format>(w, next_panel, next_step, smaller(chunk, total - next_step), planes * tiles * tile.groups);

    for (int p = 0; p < panels; ++p)
      unpack_panel<Ops>(w.data + size_t(panel + p) * panel_bytes(w), step, steps, scratch.weights + p * kLineBytes,
                        size_t(panels) * kLineBytes);
    tile.y = scratch.y + size_t(panel - block.panel_begin) * size_t(planes * rows) * kLanes;
    tile.out = m.out + size_t(block.row) * m.out_stride + panel * kLanes;
    tile.last_lanes = uint16_t(0xffff >> (missing > 0 ? missing : 0));
    for (int plane = 0; plane < planes; ++plane) {  // the fine one is added to what the other has left in out
      tile.x = (plane == 0 ? m.q : m.fine).codes + size_t(block.row) * tile.x_stride + size_t(step * kStepInputs);
      tile.rows = scratch.rows + plane * rows;
      tile.bias = m.bias == nullptr || plane == 1 ? nullptr : m.bias + panel * kLanes;
      tile.accumulate = m.accumulate || plane == 1;
      walk_gemm_rows<Ops>(tile, ahead, rows, panels);
      tile.y += size_t(rows * panels) * kLanes;
    }
    panel += panels;
  }
}

template <class Ops>
void walk_gemm(const MatmulArgs& m) {
  const PackedWeight& w = *m.weight;
  const int planes = m.fine.codes == nullptr ? 1 : 2, total = w.k / kStepInputs;
  const int chunk = gemm_chunk<typename Ops::Format>(total);
  GemmScratch scratch;
  for (int row = m.row_begin; row < m.row_end; row += kGemmRows / planes) {
    const int rows = smaller(kGemmRows / planes, m.row_end - row);
    const int width = kGemmSums / (planes * rows * kLanes) / kGemmPanels * kGemmPanels;
    for (int panel = m.panel_begin; panel < m.panel_end; panel += width) {
      const GemmBlock block{row, rows, panel, smaller(panel + width, m.panel_end)};
      for (int step = 0; step < total; step += chunk) {
        const int steps = smaller(chunk, total - step);
        fill_gemm_rows<Ops>(w, m.q, block, step, steps, scratch.rows);
        if (planes == 2) fill_gemm_rows<Ops>(w, m.fine, block, step, steps, scratch.rows + rows);
        walk_gemm_chunk<Ops>(m, scratch, block, step, chunk);
      }
    }
  }
}

}  // namespace
}  // namespace setpoint
