// Matmul with two planes of activations for kernels that know one: both pass over some panels while these are in L2.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/kernels.h"

namespace setpoint {
namespace {

template <void (*matmul)(const MatmulArgs&)>
void matmul_planes(const MatmulArgs& m) {
  if (m.fine.codes == nullptr) return matmul(m);
  constexpr int kPanels = 12;  // whole register tiles of three panels as well as of four
  MatmulArgs first = m;
  first.fine = QuantizedRows();
  for (int panel = m.panel_begin; panel < m.panel_end; panel += kPanels) {
    first.panel_begin = panel;
    first.panel_end = panel + kPanels < m.panel_end ? panel + kPanels : m.panel_end;
    matmul(first);
    MatmulArgs second = first;
    second.q = m.fine;
    second.bias = nullptr;
    second.accumulate = true;
    matmul(second);
  }
}

}  // namespace
}  // namespace setpoint
