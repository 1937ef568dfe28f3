// Packed codes and scales to vectors, with AVX-512: lane i of every vector is channel i of the panel.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/x86/packed_format.h"

#include <immintrin.h>

namespace setpoint {
namespace {

[[gnu::always_inline]] inline __m512i load_line(const uint8_t* at) { return _mm512_loadu_si512(at); }

// A vector shifted so that bit `From` of every byte arrives at bit `To`; bits of the neighbour byte come along.
template <int From, int To>
[[gnu::always_inline]] inline __m512i shift_bits(__m512i x) {
  if constexpr (From < To) return _mm512_slli_epi32(x, To - From);
  if constexpr (From > To) return _mm512_srli_epi32(x, From - To);
  return x;
}

// low | (high & mask)
template <int Mask>
[[gnu::always_inline]] inline __m512i join_bits(__m512i low, __m512i high) {
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(char(Mask)), 0xf8);
}

template <int Quad>
[[gnu::always_inline]] inline __m512i quad_of_nibbles(const uint8_t* step) {
  return _mm512_and_si512(shift_bits<Quad % 2 * 4, 0>(load_line(step + Quad / 2 * kLineBytes)), _mm512_set1_epi8(0x0f));
}

template <int Quad>
[[gnu::always_inline]] inline __m512i quad_of_pairs(const uint8_t* step) {
  return _mm512_and_si512(shift_bits<Quad % 4 * 2, 0>(load_line(step + Quad / 4 * kLineBytes)), _mm512_set1_epi8(0x03));
}

// The codes of inputs 4 Quad .. 4 Quad + 3 of a step.
template <Codes Kind, int Quad>
[[gnu::always_inline]] inline __m512i quad_codes(const uint8_t* step) {
  if constexpr (Kind == Codes::u8) return load_line(step + Quad * kLineBytes);
  if constexpr (Kind == Codes::u4) return quad_of_nibbles<Quad>(step);
  if constexpr (Kind == Codes::u2) return quad_of_pairs<Quad>(step);
  if constexpr (Kind == Codes::u3) return join_bits<0x04>(quad_of_pairs<Quad>(step), shift_bits<Quad, 2>(load_line(step + 2 * kLineBytes)));
  if constexpr (Kind == Codes::u5)
    return join_bits<0x10>(quad_of_nibbles<Quad>(step), shift_bits<Quad, 4>(load_line(step + 4 * kLineBytes)));
  if constexpr (Kind == Codes::u6)
    return join_bits<0x30>(quad_of_nibbles<Quad>(step), shift_bits<Quad % 4 * 2, 4>(load_line(step + (4 + Quad / 4) * kLineBytes)));
}

// A line in a register: without this the compiler reads it from memory again for every quad.
[[gnu::always_inline]] inline __m512i load_once(const uint8_t* at) {
  __m512i line = load_line(at);
  asm("" : "+v"(line));
  return line;
}

// The codes of the 16 inputs of half a step.
template <Codes Kind, int Half>
[[gnu::always_inline]] inline void half_step_codes(const uint8_t* step, __m512i (&codes)[4]) {
  constexpr int kBits = Half * 4;  // where the half's bits start in a line of bits
  if constexpr (Kind == Codes::u8)
    for (int i = 0; i < 4; ++i) codes[i] = load_line(step + (Half * 4 + i) * kLineBytes);
  if constexpr (Kind == Codes::u4 || Kind == Codes::u5 || Kind == Codes::u6)
    for (int i = 0; i < 2; ++i) {
      const __m512i line = load_once(step + (Half * 2 + i) * kLineBytes), mask = _mm512_set1_epi8(0x0f);
      codes[2 * i] = _mm512_and_si512(line, mask);
      codes[2 * i + 1] = _mm512_and_si512(shift_bits<4, 0>(line), mask);
    }
  if constexpr (Kind == Codes::u2 || Kind == Codes::u3) {
    const __m512i line = load_once(step + Half * kLineBytes), mask = _mm512_set1_epi8(0x03);
    codes[0] = _mm512_and_si512(line, mask);
    codes[1] = _mm512_and_si512(shift_bits<2, 0>(line), mask);
    codes[2] = _mm512_and_si512(shift_bits<4, 0>(line), mask);
    codes[3] = _mm512_and_si512(shift_bits<6, 0>(line), mask);
  }
  if constexpr (Kind == Codes::u6) {
    const __m512i line = load_once(step + (4 + Half) * kLineBytes);
    codes[0] = join_bits<0x30>(codes[0], shift_bits<0, 4>(line));
    codes[1] = join_bits<0x30>(codes[1], shift_bits<2, 4>(line));
    codes[2] = join_bits<0x30>(codes[2], line);
    codes[3] = join_bits<0x30>(codes[3], shift_bits<6, 4>(line));
  }
  if constexpr (Kind == Codes::u3 || Kind == Codes::u5) {
    constexpr int kTo = Kind == Codes::u3 ? 2 : 4;
    const __m512i line = load_once(step + (step_bytes(Kind) - kLineBytes));
    codes[0] = join_bits<1 << kTo>(codes[0], shift_bits<kBits, kTo>(line));
    codes[1] = join_bits<1 << kTo>(codes[1], shift_bits<kBits + 1, kTo>(line));
    codes[2] = join_bits<1 << kTo>(codes[2], shift_bits<kBits + 2, kTo>(line));
    codes[3] = join_bits<1 << kTo>(codes[3], shift_bits<kBits + 3, kTo>(line));
  }
}

[[gnu::always_inline]] inline __m512 load_f16(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

[[gnu::always_inline]] inline __m512 load_s8(const uint8_t* at) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

// Scale and minimum of group `group` of a record.
template <class Format>
[[gnu::always_inline]] inline __m512 group_scale(const uint8_t* record, int group) {
  if constexpr (Format::kSubScales) return _mm512_mul_ps(load_f16(record), load_s8(record + kLineBytes + group * 16));
  return load_f16(record + group * 32);
}

template <class Format>
[[gnu::always_inline]] inline __m512 group_min(const uint8_t* record, int group) {
  if constexpr (Format::kSubScales)
    return _mm512_mul_ps(load_f16(record + Format::kMinsAt), load_s8(record + Format::kSubMinsAt + group * 16));
  return load_f16(record + Format::kMinsAt + group * 32);
}

}  // namespace
}  // namespace setpoint
