// The walk of a matmul with few rows: panel after panel, so that a call reads its weights as one linear stream.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/x86/packed_format.h"

namespace setpoint {
namespace {

constexpr int kMaxFewRows = 8;              // of a tile; two planes are two of its rows
constexpr int kInputBytes = 64 * 1024;      // of activations gathered at a time
constexpr size_t kBlockBytes = 256 * 1024;  // of weights that several tiles share
constexpr int kParkedPanels = 32;           // whose running outputs are kept where K takes several chunks

// All that a step needs of the activations, side by side: its 32 codes and its scale for every row, and of every
// group what enters besides the dot product: -zero_point * sum or, affine, scale * float(sum).
template <class Format, int Rows>
struct alignas(4) StepInputs {
  int8_t codes[Rows][kStepInputs];
  float scale[Rows];
  union {
    int32_t offset[Format::kStepGroups][Rows];
    float scaled_sum[Format::kStepGroups][Rows];
  };

  void set_row(int row, const QuantizedRows& q, size_t step, int zero_point) {
    __builtin_memcpy(codes[row], q.codes + step * kStepInputs, kStepInputs);
    scale[row] = q.scales[step];
    const int32_t* sums = q.sums + 2 * step;
    for (int g = 0; g < Format::kStepGroups; ++g) {
      const int32_t sum = Format::kStepGroups == 2 ? sums[g] : sums[0] + sums[1];
      if (Format::kAffine)
        scaled_sum[g][row] = scale[row] * float(sum);
      else
        offset[g][row] = -zero_point * sum;
    }
  }
};

// Rows [row, row + Rows / planes) of m, steps [begin, begin + count): one row of the tile per plane.
template <class Format, int Rows>
void gather(const MatmulArgs& m, int row, int begin, int count, StepInputs<Format, Rows>* inputs) {
  const int planes = m.fine.codes == nullptr ? 1 : 2;
  const size_t steps = size_t(m.weight->k / kStepInputs);
  for (int r = 0; r < Rows; ++r) {
    const QuantizedRows& q = r % planes == 0 ? m.q : m.fine;
    const size_t first = size_t(row + r / planes) * steps + size_t(begin);
    for (int s = 0; s < count; ++s) inputs[s].set_row(r, q, first + size_t(s), m.weight->zero_point);
  }
}

// Ops::run_tile<Format, Rows>(panel data, inputs, steps, y [Rows][16]) adds to y; Ops::finish<Rows>(m, y, row, panel).
template <class Ops, class Format, int Rows>
__attribute__((noinline)) void walk_few_rows(const MatmulArgs& m, int row) {
  using Inputs = StepInputs<Format, Rows>;
  constexpr int kMaxSteps = kInputBytes / int(sizeof(Inputs)) / Format::kSteps * Format::kSteps;
  alignas(64) uint8_t storage[kInputBytes];
  alignas(64) float parked[kParkedPanels][Rows][16];
  Inputs* inputs = reinterpret_cast<Inputs*>(storage);

  const PackedWeight& w = *m.weight;
  const int total = w.k / kStepInputs, chunks = (total + kMaxSteps - 1) / kMaxSteps;
  const int chunk = ((total + chunks - 1) / chunks + Format::kSteps - 1) / Format::kSteps * Format::kSteps;  // whole records
  const size_t stride = panel_bytes(w);
  for (int begin = m.panel_begin; begin < m.panel_end; begin += kParkedPanels) {
    const int end = begin + kParkedPanels < m.panel_end ? begin + kParkedPanels : m.panel_end;
    for (int step = 0; step < total; step += chunk) {
      const int steps = step + chunk < total ? chunk : total - step;
      if (chunks > 1 || begin == m.panel_begin) gather<Format, Rows>(m, row, step, steps, inputs);
      const uint8_t* data = w.data + size_t(begin) * stride + size_t(step / Format::kSteps) * Format::kRecordBytes;
      for (int panel = begin; panel < end; ++panel, data += stride) {
        float (&y)[Rows][16] = parked[panel - begin];
        if (step == 0) __builtin_memset(y, 0, sizeof y);
        Ops::template run_tile<Format, Rows>(data, inputs, steps, y);
        if (step + steps == total) Ops::template finish<Rows>(m, y, row, panel);
      }
    }
  }
}

template <class Ops, class Format, int Rows = kMaxFewRows>
void dispatch_rows(const MatmulArgs& m, int row, int rows) {
  if (rows == Rows) return walk_few_rows<Ops, Format, Rows>(m, row);
  if constexpr (Rows > 1) dispatch_rows<Ops, Format, Rows - 1>(m, row, rows);
}

// Tiles of equal size. With several of them, all pass over some panels while these are in L2.
template <class Ops>
void matmul_few_rows(const MatmulArgs& m) {
  const int planes = m.fine.codes == nullptr ? 1 : 2, most = kMaxFewRows / planes, rows = m.row_end - m.row_begin;
  const int tiles = (rows + most - 1) / most;
  const size_t fit = kBlockBytes / panel_bytes(*m.weight);
  const int block = tiles == 1 ? m.panel_end - m.panel_begin : fit < 1 ? 1 : int(fit);
  visit_format(*m.weight, [&](auto format) {
    MatmulArgs part = m;
    for (part.panel_begin = m.panel_begin; part.panel_begin < m.panel_end; part.panel_begin = part.panel_end) {
      part.panel_end = m.panel_end - part.panel_begin < block ? m.panel_end : part.panel_begin + block;
      for (int tile = 0; tile < tiles; ++tile) {
        const int begin = rows * tile / tiles, end = rows * (tile + 1) / tiles;
        dispatch_rows<Ops, decltype(format)>(part, m.row_begin + begin, (end - begin) * planes);
      }
    }
  });
}

}  // namespace
}  // namespace setpoint
