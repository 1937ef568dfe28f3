// Twelve independent accumulators hide the latency of four to five cycles on two ports.
#include "probe/loops.h"

#include <immintrin.h>

namespace setpoint {
namespace {

constexpr int kChains = 12;

// The compiler may neither compute an accumulator in advance nor drop it.
inline void keep(__m512i& x) { asm volatile("" : "+v"(x)); }
inline void keep(__m512& x) { asm volatile("" : "+v"(x)); }

template <class Step>
void multiply_integers(int64_t rounds, Step step) {
  const __m512i a = _mm512_set1_epi32(0x35a1c27f), b = _mm512_set1_epi32(0x1b4f2d63);
  __m512i sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i], a, b);
  for (int i = 0; i < kChains; ++i) keep(sums[i]);
}

void int8_peak(int64_t rounds) {
  multiply_integers(rounds, [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
}

void int16_peak(int64_t rounds) {
  multiply_integers(rounds, [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); });
}

void fp32_peak(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.99f), b = _mm512_set1_ps(0.37f);
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], a, b);  // settles at 37
  for (int i = 0; i < kChains; ++i) keep(sums[i]);
}

void read_lines(const uint8_t* data, size_t bytes) {
  __m512i seen[8];
  for (int i = 0; i < 8; ++i) seen[i] = _mm512_setzero_si512();
  for (size_t at = 0; at < bytes; at += 512)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) seen[i] = _mm512_or_si512(seen[i], _mm512_load_si512(data + at + 64 * i));
  for (int i = 0; i < 8; ++i) keep(seen[i]);
}

}  // namespace

void register_avx512_probe(ProbeLoops& loops) {
  loops.int8 = {int8_peak, kChains * 64 * 2.};
  loops.int16 = {int16_peak, kChains * 32 * 2.};
  loops.fp32 = {fp32_peak, kChains * 16 * 2.};
  loops.read = read_lines;
}

}  // namespace setpoint
