// Packed codes and scales to vectors, with AVX2: half a line, 8 channels of the panel.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/x86/packed_format.h"

#include <immintrin.h>

namespace setpoint {
namespace {

[[gnu::always_inline]] inline __m256i broadcast4(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm256_set1_epi32(word);
}

// How many products of a pair of codes and activations (of at most 127) a signed 16-bit sum holds: 2 x 15 x 127 x 8, ...
constexpr int quads_per_sum(Codes codes) { return codes == Codes::u6 ? 2 : codes == Codes::u5 ? 4 : 8; }

inline __m256 load_floats(const uint8_t* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }

inline void store_floats(uint8_t* at, __m256 values) { _mm256_storeu_ps(reinterpret_cast<float*>(at), values); }

inline __m256i load_half_line(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// Bit `From` of every byte moved to bit `To`, and all but the bits of Mask cleared.
template <int From, int To, int Mask>
[[gnu::always_inline]] inline __m256i move_bits(__m256i x) {
  if constexpr (From < To) x = _mm256_slli_epi32(x, To - From);
  if constexpr (From > To) x = _mm256_srli_epi32(x, From - To);
  return _mm256_and_si256(x, _mm256_set1_epi8(char(Mask)));
}

// The codes of inputs 4 Quad .. 4 Quad + 3 of a step, for the 8 channels that `step` points at.
template <Codes Kind, int Quad>
[[gnu::always_inline]] inline __m256i quad_codes(const uint8_t* step) {
  if constexpr (Kind == Codes::u8) return load_half_line(step + Quad * kLineBytes);
  __m256i codes;
  if constexpr (Kind == Codes::u2 || Kind == Codes::u3)
    codes = move_bits<Quad % 4 * 2, 0, 0x03>(load_half_line(step + Quad / 4 * kLineBytes));
  else
    codes = move_bits<Quad % 2 * 4, 0, 0x0f>(load_half_line(step + Quad / 2 * kLineBytes));
  if constexpr (Kind == Codes::u3) return _mm256_or_si256(codes, move_bits<Quad, 2, 0x04>(load_half_line(step + 2 * kLineBytes)));
  if constexpr (Kind == Codes::u5) return _mm256_or_si256(codes, move_bits<Quad, 4, 0x10>(load_half_line(step + 4 * kLineBytes)));
  if constexpr (Kind == Codes::u6)
    return _mm256_or_si256(codes, move_bits<Quad % 4 * 2, 4, 0x30>(load_half_line(step + (4 + Quad / 4) * kLineBytes)));
  return codes;
}

[[gnu::always_inline]] inline __m256 load_f16(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

[[gnu::always_inline]] inline __m256 load_s8(const uint8_t* at) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}

// Scale and minimum of group `group` of a record, for 8 channels.
template <class Format>
[[gnu::always_inline]] inline __m256 group_scale(const uint8_t* record, int half, int group) {
  if constexpr (Format::kSubScales)
    return _mm256_mul_ps(load_f16(record + half * 16), load_s8(record + kLineBytes + group * 16 + half * 8));
  return load_f16(record + group * 32 + half * 16);
}

template <class Format>
[[gnu::always_inline]] inline __m256 group_min(const uint8_t* record, int half, int group) {
  if constexpr (Format::kSubScales)
    return _mm256_mul_ps(load_f16(record + Format::kMinsAt + half * 16), load_s8(record + Format::kSubMinsAt + group * 16 + half * 8));
  return load_f16(record + Format::kMinsAt + group * 32 + half * 16);
}

}  // namespace
}  // namespace setpoint
