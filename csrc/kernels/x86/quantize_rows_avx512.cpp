// Activations to signed bytes with AVX-512. Bit-equal to ref/quantize_rows.cpp.
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h

namespace setpoint {
namespace {

constexpr int kGroup = 32;

inline __m512i magnitude_bits(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

// The largest magnitude as bits: exact in any order, and a NaN outranks everything.
inline float group_scale(__m512 first, __m512 second) {
  const __m512i both = _mm512_max_epi32(magnitude_bits(first), magnitude_bits(second));
  const __m256i m8 = _mm256_max_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
  __m128i m4 = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0x4e));
  m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0xb1));
  return _mm_cvtss_f32(_mm_div_ss(_mm_castsi128_ps(m4), _mm_set_ss(127.f)));
}

inline __m128i codes_of(__m512 x, __m512 scale, __mmask16 valid) {
  const __m512 limit = _mm512_set1_ps(127.f);
  __m512 quotient = _mm512_maskz_div_ps(valid, x, scale);  // no codes for a scale of zero, infinity or NaN
  quotient = _mm512_min_ps(_mm512_max_ps(quotient, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(quotient));  // rounds to nearest even
}

inline int32_t sum_of(__m128i codes) {  // 16 signed bytes, made unsigned for the byte-sum instruction
  const __m128i halves = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(halves) + _mm_extract_epi32(halves, 2) - 16 * 128;
}

inline void quantize_group(const float* x, int8_t* codes, float* scale_out, int32_t* sums) {
  const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
  const float scale = group_scale(first, second);
  const __m512 wide = _mm512_set1_ps(scale);
  const __mmask16 valid = scale > 0 && scale < __builtin_inff() ? 0xffff : 0;
  const __m128i low = codes_of(first, wide, valid), high = codes_of(second, wide, valid);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), high);
  *scale_out = scale;
  sums[0] = sum_of(low);
  sums[1] = sum_of(high);
}

void quantize_rows(const float* x, size_t x_stride, int rows, int n, int8_t* codes, float* scales, int32_t* sums, size_t out_k) {
  for (int row = 0; row < rows; ++row, x += x_stride, codes += out_k, scales += out_k / 32, sums += out_k / 16)
    for (int group = 0; group < n / kGroup; ++group)
      quantize_group(x + group * kGroup, codes + group * kGroup, scales + group, sums + 2 * group);
}

}  // namespace

void register_avx512_quantize_rows(KernelTable& t) { t.quantize_rows = quantize_rows; }

}  // namespace setpoint
