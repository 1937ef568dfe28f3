#include "kernels/kernels.h"
// The order matters: what follows is written in the Lanes of this ISA.
#include "kernels/x86/lanes_avx2.h"

#include "kernels/x86/lanes_math.h"
#include "kernels/x86/layers_lanes.h"

namespace setpoint {

void register_avx2_attention(KernelTable& t);  // attention_avx2.cpp

void register_avx2_layers(KernelTable& t) {
  t.rms_norm = rms_norm;
  t.rope = rope;
  t.silu_mul = silu_mul;
  t.gelu_tanh_mul = gelu_tanh_mul;
  t.add = add_rows;
  t.exp = exp_values;
  register_avx2_attention(t);
}

}  // namespace setpoint
