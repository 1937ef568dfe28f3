// One vector of 16 floats and the few operations that layers_lanes.h and attention_lanes.h are written in.
// lanes_avx2.h has the same names for 8 floats. Included by *_avx512.cpp only.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/kernels.h"
#include "kernels/math.h"

namespace setpoint {
namespace {

using Lanes = __m512;
constexpr int kLanes = 16;

SETPOINT_INLINE __mmask16 first_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

SETPOINT_INLINE Lanes load(const float* p) { return _mm512_loadu_ps(p); }
SETPOINT_INLINE void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
SETPOINT_INLINE Lanes load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_mask(n), p); }  // others 0
SETPOINT_INLINE void store_first(float* p, int n, Lanes x) { _mm512_mask_storeu_ps(p, first_mask(n), x); }
SETPOINT_INLINE Lanes broadcast(float x) { return _mm512_set1_ps(x); }

SETPOINT_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
SETPOINT_INLINE Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
SETPOINT_INLINE Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
SETPOINT_INLINE Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
SETPOINT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
SETPOINT_INLINE Lanes fms(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a, b, c); }
SETPOINT_INLINE Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }  // b if either is NaN
SETPOINT_INLINE Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
SETPOINT_INLINE Lanes negate(Lanes x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.f)); }

// x in lanes begin <= i < end, else `other`.
SETPOINT_INLINE Lanes select_range(int begin, int end, Lanes x, Lanes other) {
  return _mm512_mask_mov_ps(other, static_cast<__mmask16>(first_mask(end) & ~first_mask(begin)), x);
}

// p * 2^n, n integral in [-151, 129], rounded once.
SETPOINT_INLINE Lanes scale_by_power(Lanes p, Lanes shifted) { return _mm512_scalef_ps(p, sub(shifted, broadcast(kRoundShift))); }

// Tree over 16 lanes held in 16 / kLanes vectors: i and i + 8, then i + 4, i + 2, i + 1.
SETPOINT_INLINE __m256 low_half(Lanes x) { return _mm512_castps512_ps256(x); }
SETPOINT_INLINE __m256 high_half(Lanes x) { return _mm512_extractf32x8_ps(x, 1); }
SETPOINT_INLINE __m256 fold_sum(const Lanes* x) { return _mm256_add_ps(low_half(x[0]), high_half(x[0])); }
SETPOINT_INLINE __m256 fold_max(const Lanes* x) { return _mm256_max_ps(low_half(x[0]), high_half(x[0])); }

template <KvFormat F>
SETPOINT_INLINE Lanes load_kv(const uint8_t* base, size_t element) {
  if constexpr (F == KvFormat::f32) return _mm512_loadu_ps(base + element * 4);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(base + element * 2));
  if constexpr (F == KvFormat::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <KvFormat F>
SETPOINT_INLINE Lanes load_kv_first(const uint8_t* base, size_t element, int n) {
  if constexpr (F == KvFormat::f32) return _mm512_maskz_loadu_ps(first_mask(n), base + element * 4);
  const __m256i half = _mm256_maskz_loadu_epi16(first_mask(n), base + element * 2);
  if constexpr (F == KvFormat::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

SETPOINT_INLINE __m256i narrow_f16(Lanes x) {
  x = max(broadcast(-kF16Largest), min(broadcast(kF16Largest), x));
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SETPOINT_INLINE __m256i narrow_bf16(Lanes x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i sign = _mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  __m512i magnitude = _mm512_andnot_si512(_mm512_set1_epi32(static_cast<int>(0x80000000u)), u);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  magnitude = _mm512_min_epi32(magnitude, _mm512_set1_epi32(static_cast<int>(kBf16LargestBits)));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_or_si512(sign, rounded);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <KvFormat F>
SETPOINT_INLINE void store_kv(uint8_t* base, size_t element, Lanes x) {
  if constexpr (F == KvFormat::f32) return _mm512_storeu_ps(base + element * 4, x);
  const __m256i narrow = F == KvFormat::f16 ? narrow_f16(x) : narrow_bf16(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(base + element * 2), narrow);
}

template <KvFormat F>
SETPOINT_INLINE void store_kv_first(uint8_t* base, size_t element, int n, Lanes x) {
  if constexpr (F == KvFormat::f32)
    _mm512_mask_storeu_ps(base + element * 4, first_mask(n), x);
  else
    _mm256_mask_storeu_epi16(base + element * 2, first_mask(n), F == KvFormat::f16 ? narrow_f16(x) : narrow_bf16(x));
}

// Integers in the width of Lanes: 32-bit, or pairs of 16-bit codes in each 32-bit lane.
using Ints = __m512i;
SETPOINT_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
SETPOINT_INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
SETPOINT_INLINE void store_ints(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
SETPOINT_INLINE Ints load_first_ints(const void* p, int n) { return _mm512_maskz_loadu_epi32(first_mask(n), p); }
SETPOINT_INLINE Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
SETPOINT_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
SETPOINT_INLINE Ints max_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
SETPOINT_INLINE int32_t top_int(Ints x) { return _mm512_reduce_max_epi32(x); }
// Written out: around the intrinsic GCC 12 copies every accumulator once a round.
SETPOINT_INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
SETPOINT_INLINE Lanes to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
SETPOINT_INLINE Ints bits(Lanes x) { return _mm512_castps_si512(x); }
SETPOINT_INLINE Ints magnitude(Lanes x) { return _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7fffffff)); }
SETPOINT_INLINE Lanes add_exponent(Lanes p, Lanes shifted) {
  return _mm512_castsi512_ps(_mm512_add_epi32(bits(p), _mm512_slli_epi32(bits(shifted), 23)));
}
SETPOINT_INLINE Lanes where_at_least(Lanes x, Lanes limit, Lanes then, Lanes otherwise) {  // otherwise for NaN
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), then);
}
// kLanes codes, rounded to nearest even.
SETPOINT_INLINE void store_codes(int16_t* p, Lanes x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

}  // namespace
}  // namespace setpoint
