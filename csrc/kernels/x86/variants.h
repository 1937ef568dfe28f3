// Register functions of single files, called by the register_<isa>_matmul of their ISA.
#pragma once
#include "kernels/kernels.h"

namespace setpoint {

void register_avx2_matmul_float(KernelTable& t);
void register_avx2_quantize_rows(KernelTable& t);
void register_avx512_matmul_float(KernelTable& t);
void register_avx512_quantize_rows(KernelTable& t);

// The quantized matmul for many rows.
void matmul_gemm_avx2(const MatmulArgs& m);
void matmul_gemm_avx512(const MatmulArgs& m);

}  // namespace setpoint
