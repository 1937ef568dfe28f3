// KvFormat::s16: K and V as 16-bit integers with one scale per (token, head), and attention over them, to the bit.
// ref/attention_codes.cpp is this text as plain loops. Dot products are exact integers, so their order is free.
//
// A vector x of head_dim floats (K, V, or a row's q of one head) is stored as codes and a scale:
//   top = max |x_d|;  scale = top / 8191;  code_d = round to nearest even of x_d * (8191 / top)
// With top < 2^-100 all are 0. With top infinite or NaN the codes are 0 and the scale is NaN, which reaches the result.
// 8191^2 * 32 < 2^31: sums of 32 products never leave int32.
//
// K page: [head_dim / 2][16 tokens][2 dims] codes, V page: [8 token pairs][head_dim][2 tokens] codes; then [16] f32 scales.
//
// A row's visible tokens of one 64-token block, everything in units of log2:
//   u_t = (sum over chunks of 32 dims, ascending from 0, of float(sum of q_d * k_td)) * k_scale_t
//   m'  = max(m, max_t u_t * s) + 0.0f, s = (q scale) * (scale * log2 e)
//   p_t = exp2(fma(u_t, s, -m')), 0 for tokens the row does not see;  c = exp2(m - m');  l as in attention.h
//   w_t = p_t * v_scale_t, 0 for tokens the row does not see;  top = max w_t;  weight code_t = rne(w_t * (8191 / top))
//   o_d = o_d * c, then for both 32-token halves, ascending: o_d = fma(float(sum of code_t * v_td), top / 8191, o_d)
// with top < 2^-100 treated as above: codes 0 (and weight scale 0). At the end of a split m becomes m * ln 2, o becomes
// o + 0.0f; the merge is that of attention.h.
//
// Maxima of magnitudes compare bits: they are >= 0, and NaN is the greatest. m' ignores a NaN u_t; its p_t makes l NaN.
#pragma once
#include "kernels/attention.h"

namespace setpoint {

constexpr int kChunk = 32;  // products per exact sum
constexpr int kMostCodeHeadDim = 1024;
constexpr float kLargestCode = 8191.f;
constexpr float kSmallestTop = 0x1p-100f;

constexpr float kLn2 = 0x1.62e430p-1f;

// The magnitude of x as an integer that orders like it.
SETPOINT_INLINE int32_t magnitude_bits(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffffu); }

struct CodeScale {
  float scale, inverse;
};
SETPOINT_INLINE CodeScale code_scale(int32_t top_bits) {
  const float top = float_of(static_cast<uint32_t>(top_bits));
  if (top_bits >= 0x7f800000) return {float_of(0x7fc00000u), 0.f};
  if (top < kSmallestTop) return {0.f, 0.f};
  return {top / kLargestCode, kLargestCode / top};
}

// Round to nearest even; |x| <= 2^21.
SETPOINT_INLINE int16_t code_of(float x) {
  return static_cast<int16_t>(static_cast<int32_t>(bits_of(x + kRoundShift)) - static_cast<int32_t>(bits_of(kRoundShift)));
}

SETPOINT_INLINE float score_scale(float q_scale, float scale) { return q_scale * (scale * kLog2E); }

SETPOINT_INLINE size_t k_code_index(int d, int slot) { return static_cast<size_t>(d / 2 * kPageTokens + slot) * 2 + d % 2; }
SETPOINT_INLINE size_t v_code_index(int head_dim, int slot, int d) { return (static_cast<size_t>(slot / 2) * head_dim + d) * 2 + slot % 2; }
SETPOINT_INLINE size_t scales_offset(int head_dim) { return static_cast<size_t>(head_dim) * kPageTokens * 2; }  // bytes into a page

void ref_kv_store_codes(const KvStoreArgs& a);
void ref_add_block_codes(const AttentionArgs& a, int kv_head, const float* q, int start, TokenRange visible, float& m, float& l, float* o);

}  // namespace setpoint
