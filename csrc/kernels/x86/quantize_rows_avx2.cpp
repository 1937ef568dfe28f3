// Activations to signed bytes with AVX2. Bit-equal to ref/quantize_rows.cpp.
#include "kernels/x86/variants.h"

#include <immintrin.h>

namespace setpoint {
namespace {

constexpr int kGroup = 32;

inline __m256i magnitude_bits(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }

// The largest magnitude as bits: exact in any order, and a NaN outranks everything.
inline float group_scale(const __m256 (&x)[4]) {
  const __m256i m8 = _mm256_max_epi32(_mm256_max_epi32(magnitude_bits(x[0]), magnitude_bits(x[1])),
                                      _mm256_max_epi32(magnitude_bits(x[2]), magnitude_bits(x[3])));
  __m128i m4 = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
  m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0x4e));
  m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0xb1));
  return _mm_cvtss_f32(_mm_div_ss(_mm_castsi128_ps(m4), _mm_set_ss(127.f)));
}

inline __m256i codes_of(__m256 x, __m256 scale) {
  const __m256 limit = _mm256_set1_ps(127.f);
  const __m256 quotient = _mm256_max_ps(_mm256_div_ps(x, scale), _mm256_sub_ps(_mm256_setzero_ps(), limit));
  return _mm256_cvtps_epi32(_mm256_min_ps(quotient, limit));  // rounds to nearest even
}

void quantize_group(const float* at, int8_t* codes, float* scale, int32_t* sums) {
  const __m256 x[4] = {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8), _mm256_loadu_ps(at + 16), _mm256_loadu_ps(at + 24)};
  *scale = group_scale(x);
  __m256i bytes = _mm256_setzero_si256();  // no codes for a scale of zero, infinity or NaN
  if (*scale > 0 && *scale < __builtin_inff()) {
    const __m256 wide = _mm256_set1_ps(*scale);
    const __m256i first = _mm256_packs_epi32(codes_of(x[0], wide), codes_of(x[1], wide));
    const __m256i second = _mm256_packs_epi32(codes_of(x[2], wide), codes_of(x[3], wide));
    bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
  // The byte-sum instruction wants unsigned bytes: add 128 to each of the 16.
  const __m256i parts = _mm256_sad_epu8(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  sums[0] = _mm256_extract_epi32(parts, 0) + _mm256_extract_epi32(parts, 2) - 16 * 128;
  sums[1] = _mm256_extract_epi32(parts, 4) + _mm256_extract_epi32(parts, 6) - 16 * 128;
}

void quantize_rows(const float* x, size_t x_stride, int rows, int n, int8_t* codes, float* scales, int32_t* sums, size_t out_k) {
  for (int row = 0; row < rows; ++row, x += x_stride, codes += out_k, scales += out_k / 32, sums += out_k / 16)
    for (int group = 0; group < n / kGroup; ++group)
      quantize_group(x + group * kGroup, codes + group * kGroup, scales + group, sums + 2 * group);
}

}  // namespace

void register_avx2_quantize_rows(KernelTable& t) { t.quantize_rows = quantize_rows; }

}  // namespace setpoint
