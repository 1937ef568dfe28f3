// The Python object `_native.Weight`: programs keep a reference to it, so that its storage outlives them.
#pragma once
#include "quant/packed_matrix.h"

namespace setpoint {

struct Weight {
  PackedMatrix matrix;
};

}  // namespace setpoint
