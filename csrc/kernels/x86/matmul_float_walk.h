// The walk over panels, rows and K of the float matmuls that the x86 ISAs share; each brings its register tiles.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/kernels.h"

namespace setpoint {
namespace {

constexpr int kLanes = 16;
constexpr int kFloatBlock = 64;     // inputs summed by themselves before they join the output (kernels.h)
constexpr int kFloatRowBlock = 24;  // its inputs, its outputs and a block of weights share a 32 KiB L1
constexpr int kFloatPanels = 4;
constexpr int kFloatStride = kFloatPanels * kLanes;

inline int smaller(int a, int b) { return a < b ? a : b; }

// y[rows][panels * 16] += the products of `count` inputs, summed from 0 in ascending order.
struct FloatTile {
  const uint8_t* data;  // weights of the first panel at the first input
  size_t data_stride;   // bytes from panel to panel
  const float* x;
  size_t x_stride;
  int count;
  float* y;  // [row][kFloatStride]
};

inline void store_float_outputs(const MatmulArgs& m, const float (*y)[kFloatStride], int row_begin, int rows, int channel_begin,
                                int channels) {
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

// Rows of each tile when `rows` are spread evenly over tiles of at most `most`.
inline int even_tile(int rows, int most) {
  const int tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

template <class Ops>
void walk_float_block(const MatmulArgs& m, int panel_begin, int panels, int row_begin, int rows) {
  const PackedWeight& w = *m.weight;
  alignas(64) float y[kFloatRowBlock][kFloatStride];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < panels * kLanes; ++c) y[r][c] = 0;

  const size_t input_bytes = kLanes * Ops::kWeightBytes;
  const int tile_rows = even_tile(rows, Ops::kTileRows);
  FloatTile tile{};
  tile.data_stride = size_t(w.k) * input_bytes;
  tile.x_stride = m.x_stride;
  for (int k = 0; k < w.k; k += kFloatBlock) {
    tile.data = w.data + size_t(panel_begin) * tile.data_stride + size_t(k) * input_bytes;
    tile.count = smaller(kFloatBlock, w.k - k);
    for (int r = 0; r < rows; r += tile_rows) {
      tile.x = m.x + size_t(row_begin + r) * m.x_stride + k;
      tile.y = y[r];
      Ops::run(tile, smaller(tile_rows, rows - r), panels);
    }
  }
  const int channel_begin = panel_begin * kLanes;
  store_float_outputs(m, y, row_begin, rows, channel_begin, smaller(panels * kLanes, w.n - channel_begin));
}

template <class Ops>
void walk_float(const MatmulArgs& m) {
  for (int panel = m.panel_begin; panel < m.panel_end; panel += kFloatPanels)
    for (int row = m.row_begin; row < m.row_end; row += kFloatRowBlock)
      walk_float_block<Ops>(m, panel, smaller(kFloatPanels, m.panel_end - panel), row, smaller(kFloatRowBlock, m.row_end - row));
}

}  // namespace
}  // namespace setpoint
