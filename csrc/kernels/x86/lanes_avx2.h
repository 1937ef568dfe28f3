// One vector of 8 floats under the names of lanes_avx512.h. Included by *_avx2.cpp only.
#pragma once
#include <immintrin.h>

#include "kernels/kernels.h"
#include "kernels/math.h"

namespace setpoint {
namespace {

using Lanes = __m256;
constexpr int kLanes = 8;

alignas(32) constexpr int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
SETPOINT_INLINE __m256i first_mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + 8 - n)); }

SETPOINT_INLINE Lanes load(const float* p) { return _mm256_loadu_ps(p); }
SETPOINT_INLINE void store(float* p, Lanes x) { _mm256_storeu_ps(p, x); }
SETPOINT_INLINE Lanes load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_mask(n)); }  // others 0
SETPOINT_INLINE void store_first(float* p, int n, Lanes x) { _mm256_maskstore_ps(p, first_mask(n), x); }
SETPOINT_INLINE Lanes broadcast(float x) { return _mm256_set1_ps(x); }

SETPOINT_INLINE Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
SETPOINT_INLINE Lanes sub(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
SETPOINT_INLINE Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
SETPOINT_INLINE Lanes div(Lanes a, Lanes b) { return _mm256_div_ps(a, b); }
SETPOINT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
SETPOINT_INLINE Lanes fms(Lanes a, Lanes b, Lanes c) { return _mm256_fmsub_ps(a, b, c); }
SETPOINT_INLINE Lanes max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }  // b if either is NaN
SETPOINT_INLINE Lanes min(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
SETPOINT_INLINE Lanes negate(Lanes x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.f)); }

SETPOINT_INLINE Lanes select_range(int begin, int end, Lanes x, Lanes other) {
  const __m256i keep = _mm256_andnot_si256(first_mask(begin), first_mask(end));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(keep));
}

// p * 2^n in two exact factors, as exp_scalar does it: only a subnormal result is rounded, once.
SETPOINT_INLINE Lanes scale_by_power(Lanes p, Lanes shifted) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(broadcast(kRoundShift)));
  const __m256i half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
  return mul(mul(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

SETPOINT_INLINE __m256 fold_sum(const Lanes* x) { return _mm256_add_ps(x[0], x[1]); }
SETPOINT_INLINE __m256 fold_max(const Lanes* x) { return _mm256_max_ps(x[0], x[1]); }

template <KvFormat F>
SETPOINT_INLINE Lanes load_kv(const uint8_t* base, size_t element) {
  if constexpr (F == KvFormat::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(base) + element);
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(base + element * 2));
  if constexpr (F == KvFormat::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Head sizes are multiples of 8 here, so a whole vector is always there.
template <KvFormat F>
SETPOINT_INLINE Lanes load_kv_first(const uint8_t* base, size_t element, int) {
  return load_kv<F>(base, element);
}

SETPOINT_INLINE __m128i narrow_f16(Lanes x) {
  x = max(broadcast(-kF16Largest), min(broadcast(kF16Largest), x));
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SETPOINT_INLINE __m128i narrow_bf16(Lanes x) {
  const __m256i sign_bit = _mm256_set1_epi32(static_cast<int>(0x80000000u)), u = _mm256_castps_si256(x);
  __m256i magnitude = _mm256_andnot_si256(sign_bit, u);
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  magnitude = _mm256_min_epi32(magnitude, _mm256_set1_epi32(static_cast<int>(kBf16LargestBits)));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7fff)), odd);
  rounded = _mm256_or_si256(_mm256_and_si256(u, sign_bit), rounded);
  rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

template <KvFormat F>
SETPOINT_INLINE void store_kv(uint8_t* base, size_t element, Lanes x) {
  if constexpr (F == KvFormat::f32)
    _mm256_storeu_ps(reinterpret_cast<float*>(base) + element, x);
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(base + element * 2), F == KvFormat::f16 ? narrow_f16(x) : narrow_bf16(x));
}

template <KvFormat F>
SETPOINT_INLINE void store_kv_first(uint8_t* base, size_t element, int, Lanes x) {
  store_kv<F>(base, element, x);
}

using Ints = __m256i;
SETPOINT_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
SETPOINT_INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
SETPOINT_INLINE void store_ints(int32_t* p, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
SETPOINT_INLINE Ints load_first_ints(const void* p, int) { return load_ints(p); }
SETPOINT_INLINE Ints broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
SETPOINT_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
SETPOINT_INLINE Ints max_ints(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
SETPOINT_INLINE int32_t top_int(Ints x) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)));
}
SETPOINT_INLINE Ints dot_pairs(Ints sum, Ints a, Ints b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
SETPOINT_INLINE Lanes to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
SETPOINT_INLINE Ints bits(Lanes x) { return _mm256_castps_si256(x); }
SETPOINT_INLINE Ints magnitude(Lanes x) { return _mm256_and_si256(bits(x), _mm256_set1_epi32(0x7fffffff)); }
SETPOINT_INLINE Lanes add_exponent(Lanes p, Lanes shifted) {
  return _mm256_castsi256_ps(_mm256_add_epi32(bits(p), _mm256_slli_epi32(bits(shifted), 23)));
}
SETPOINT_INLINE Lanes where_at_least(Lanes x, Lanes limit, Lanes then, Lanes otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, limit, _CMP_GE_OQ));
}
SETPOINT_INLINE void store_codes(int16_t* p, Lanes x) {
  const __m256i whole = _mm256_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}

}  // namespace
}  // namespace setpoint
