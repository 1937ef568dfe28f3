// vdpbf16ps, in a unit of its own: few CPUs with VNNI lack it, but some do.
#include "probe/loops.h"

#include <immintrin.h>

namespace setpoint {
namespace {

constexpr int kChains = 12;

void bf16_peak(int64_t rounds) {
  const __m512bh a = __m512bh(_mm512_set1_epi32(0x3c003c00)), b = __m512bh(_mm512_set1_epi32(0x3c80bc80));  // small; b alternates
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  for (int i = 0; i < kChains; ++i) asm volatile("" : "+v"(sums[i]));
}

}  // namespace

void register_bf16_probe(ProbeLoops& loops) { loops.bf16 = {bf16_peak, kChains * 32 * 2.}; }

}  // namespace setpoint
