#pragma once
#include "kernels/kernels.h"

namespace setpoint {

void register_ref_quantize(KernelTable& t);  // called by register_ref_matmul

}  // namespace setpoint
