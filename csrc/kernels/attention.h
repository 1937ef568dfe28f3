// Paged attention, to the bit: what kernels.h leaves open. ref/attention.cpp is this text as plain loops.
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
// `out` at the first head of the group.
#pragma once
#include <cstddef>

#include "kernels/kernels.h"
#include "kernels/math.h"

namespace setpoint {

constexpr int kLane16 = 16;
constexpr int kAttentionTileQueries = 6;  // (row, head) pairs that share a load of K and V in the x86 variants

struct TokenRange {
  int begin, end;
  SETPOINT_INLINE TokenRange visible(int position, int window) {
    return {window > 0 && position >= window ? position - window + 1 : 0, position + 1};
  }
  __attribute__((always_inline)) bool empty() const { return begin >= end; }
  __attribute__((always_inline)) TokenRange within(int low, int high) const { return {begin > low ? begin : low, end < high ? end : high}; }
};

SETPOINT_INLINE size_t kv_element_bytes(KvFormat format) { return format == KvFormat::f32 ? 4 : 2; }

// Index of the first element of the page that holds `token`, in k and in v alike.
SETPOINT_INLINE size_t page_element(const KvView& kv, const int32_t* block_table, int kv_head, int token) {
  const size_t block = static_cast<size_t>(block_table[token / kPageTokens]);
  return (block * kv.kv_heads + kv_head) * kPageTokens * kv.head_dim;
}

// o rows in scratch are padded to whole 16-lane vectors.
SETPOINT_INLINE int padded_head_dim(int head_dim) { return (head_dim + kLane16 - 1) / kLane16 * kLane16; }

SETPOINT_INLINE size_t partial_stride_of(const AttentionArgs& a) {  // floats from one (row, head) to the next
  const int splits = a.partial_splits > 0 ? a.partial_splits : a.split_end - a.split_begin;
  return static_cast<size_t>(splits) * (a.kv.head_dim + 2);
}

void ref_kv_store(const KvStoreArgs& a);
void ref_attention(const AttentionArgs& a);
void ref_attention_merge(const float* partial, int rows, int group, int splits, int head_dim, float* out, size_t out_stride);

}  // namespace setpoint
