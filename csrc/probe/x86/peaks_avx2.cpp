// The AVX2 chains that the kernels of this ISA are made of.
#include "probe/loops.h"

#include <immintrin.h>

namespace setpoint {
namespace {

constexpr int kChains = 10;  // with the operands and a product, 16 registers hold no more

// Makes `x` look new, so that a product of constants is not computed once for all rounds.
inline void renew(__m256i& x) { asm volatile("" : "+x"(x)); }

template <class Product>
void multiply_integers(int64_t rounds, Product product) {
  __m256i a = _mm256_set1_epi32(0x05010207), b = _mm256_set1_epi32(0x1b4f2d63);
  __m256i sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_epi32(i);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) {
      renew(a);
      sums[i] = _mm256_add_epi32(sums[i], product(a, b));
    }
  for (int i = 0; i < kChains; ++i) renew(sums[i]);
}

void int8_peak(int64_t rounds) {
  const __m256i ones = _mm256_set1_epi16(1);
  multiply_integers(rounds, [ones](__m256i a, __m256i b) { return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones); });
}

void int16_peak(int64_t rounds) {
  multiply_integers(rounds, [](__m256i a, __m256i b) { return _mm256_madd_epi16(a, b); });
}

void fp32_peak(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.99f), b = _mm256_set1_ps(0.37f);
  __m256 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_ps(float(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);  // settles at 37
  for (int i = 0; i < kChains; ++i) asm volatile("" : "+x"(sums[i]));
}

void read_lines(const uint8_t* data, size_t bytes) {
  __m256i seen[8];
  for (int i = 0; i < 8; ++i) seen[i] = _mm256_setzero_si256();
  for (size_t at = 0; at < bytes; at += 256)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) seen[i] = _mm256_or_si256(seen[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i)));
  for (int i = 0; i < 8; ++i) renew(seen[i]);
}

}  // namespace

void register_avx2_probe(ProbeLoops& loops) {
  loops.int8 = {int8_peak, kChains * 32 * 2.};
  loops.int16 = {int16_peak, kChains * 16 * 2.};
  loops.fp32 = {fp32_peak, kChains * 8 * 2.};
  loops.read = read_lines;
}

}  // namespace setpoint
