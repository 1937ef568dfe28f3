// Paged attention, to the bit: what kernels.h leaves open. ref/attention.cpp is this text as plain loops.
// Blocks of the integer format are attention_codes.h's; splits and their merge are the same.
//
// Scores of a row's visible tokens in one 64-token block:
//   s_t = (fma over d ascending from 0 of q_d * k_td) * scale        one accumulator per (q head, token)
//   m'  = max(m, max_t s_t) + 0.0f                                    (-0 becomes +0)
//   p_t = exp(s_t - m'), 0 for tokens the row does not see;  c = exp(m - m')
//   l   = fma(l, c, sum), sum = tree16(lane), lane i = ((p_i + p_{i+16}) + p_{i+32}) + p_{i+48}
//   o_d = o_d * c, then o_d = fma(p_t, v_td, o_d), t ascending
// from m = -inf, l = 0, o = 0 at the start of every split. tree16 adds lanes i and i + 8, then i + 4, i + 2, i + 1.
// A block without a visible token leaves (m, l, o) alone; a split without one has l = 0 and is left out below.
//
// A call may add p_t = 0 terms for tokens that only other rows of the call see. They change nothing but the sign of
// a zero, so the o of a split ends with o_d + 0.0f. Tokens no row of the call sees are never read from V, and what
// K holds for them is discarded before the maximum; block table entries without a visible token are not looked at.
//
// Splits, ascending, from M = -inf, L = 0, O = 0:
//   M' = max(M, m);  a = exp(M - M'), b = exp(m - M');  L = fma(L, a, l * b);  O_d = fma(O_d, a, o_d * b)
// (exact identity for the first split). Result: O_d / L, or 0 for a row that sees no token of the call's splits.
//
// Heads: `q` and `out` of AttentionArgs start at head 0 of the row (head h at h * head_dim); attention_merge takes
// `out` at the first head of the call that made the partial results.
#pragma once
#include <cstddef>

#include "kernels/kernels.h"
#include "kernels/math.h"

namespace setpoint {

constexpr int kLane16 = 16;
constexpr int kAttentionTileQueries = 6;  // (row, head) pairs that share a load of K and V in the x86 variants

constexpr int kAttentionTileFloats = 64;  // of scratch that such a tile's record takes

struct TokenRange {
  int begin, end;
  SETPOINT_INLINE TokenRange visible(int position, int window) {
    return {window > 0 && position >= window ? position - window + 1 : 0, position + 1};
  }
  __attribute__((always_inline)) bool empty() const { return begin >= end; }
  __attribute__((always_inline)) TokenRange within(int low, int high) const { return {begin > low ? begin : low, end < high ? end : high}; }
};

SETPOINT_INLINE constexpr size_t kv_element_bytes(KvFormat format) { return format == KvFormat::f32 ? 4 : 2; }

SETPOINT_INLINE size_t kv_page_bytes(KvFormat format, int head_dim) {
  const size_t scales = format == KvFormat::s16 ? kPageTokens * sizeof(float) : 0;
  return kv_element_bytes(format) * kPageTokens * static_cast<size_t>(head_dim) + scales;
}

// Bytes of a layer's keys, or values, in a span.
SETPOINT_INLINE size_t kv_span_bytes(KvFormat format, int kv_heads, int head_dim) {
  return static_cast<size_t>(kSpanBlocks * kv_heads) * kv_page_bytes(format, head_dim);
}

// Bytes from the start of k, and of v, to the page of a block and head.
SETPOINT_INLINE size_t page_offset(const KvView& kv, int block, int kv_head) {
  const unsigned id = static_cast<unsigned>(block);
  return id / kSpanBlocks * kv.span_stride +
         static_cast<size_t>(static_cast<int>(id % kSpanBlocks) * kv.kv_heads + kv_head) * kv_page_bytes(kv.format, kv.head_dim);
}

// The sum of a block's probabilities; `p` is overwritten.
SETPOINT_INLINE float sum_of_block(float* p) {
  for (int i = 0; i < kLane16; ++i) p[i] = ((p[i] + p[i + 16]) + p[i + 32]) + p[i + 48];
  for (int width = kLane16 / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) p[i] = p[i] + p[i + width];
  return p[0];
}

// o rows in scratch are padded to whole 16-lane vectors.
SETPOINT_INLINE int padded_head_dim(int head_dim) { return (head_dim + kLane16 - 1) / kLane16 * kLane16; }

SETPOINT_INLINE int heads_of(const AttentionArgs& a) { return (a.kv_head_end - a.kv_head_begin) * a.group; }  // q heads of a call

// (m, l, o) of a row, a head of the call (0 the first), a split.
SETPOINT_INLINE float* partial_entry(const AttentionArgs& a, int row, int head, int split) {
  const size_t splits = a.partial_splits > 0 ? a.partial_splits : a.split_end - a.split_begin, entry = a.kv.head_dim + 2;
  const size_t row_floats = a.partial_row > 0 ? a.partial_row : heads_of(a) * splits * entry;
  return a.partial + row * row_floats + (head * splits + (split - a.split_begin)) * entry;
}

void ref_kv_store(const KvStoreArgs& a);
void ref_attention(const AttentionArgs& a);
void ref_attention_merge(const float* partial, int rows, int heads, int splits, int head_dim, float* out, size_t out_stride);

}  // namespace setpoint
