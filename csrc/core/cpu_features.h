// What this CPU and operating system can run. Detected once.
#pragma once

namespace setpoint {

struct CpuFeatures {
  bool avx2 = false;         // AVX2 + FMA + F16C
  bool avx512_vnni = false;  // AVX-512 F, BW, DQ, VL, VNNI
  bool avx512_bf16 = false;
};

const CpuFeatures& cpu_features();

}  // namespace setpoint
