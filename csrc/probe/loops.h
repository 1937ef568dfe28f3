// The inner loops of the probes, one table a process: what an instruction can do at most, with nothing else in its way.
//
// Files in x86/ are compiled for their ISA, under the same rule as the kernels: no symbol that another unit could link
// but the register function.
#pragma once
#include <cstddef>
#include <cstdint>

namespace setpoint {

struct PeakLoop {
  void (*run)(int64_t rounds) = nullptr;  // null: this CPU has no such instruction
  double operations_per_round = 0;        // a multiplication and its addition are two
};

struct ProbeLoops {
  PeakLoop int8;   // unsigned x signed bytes into int32: vpdpbusd, or vpmaddubsw + vpmaddwd + vpaddd on AVX2
  PeakLoop int16;  // vpdpwssd, or vpmaddwd + vpaddd
  PeakLoop bf16;   // vdpbf16ps
  PeakLoop fp32;   // fused multiply-add
  void (*read)(const uint8_t* data, size_t bytes) = nullptr;  // loads every byte once; bytes: a multiple of 4096
};

void register_avx2_probe(ProbeLoops& loops);
void register_avx512_probe(ProbeLoops& loops);
void register_bf16_probe(ProbeLoops& loops);

const ProbeLoops& probe_loops();  // the best of this CPU, chosen once

}  // namespace setpoint
