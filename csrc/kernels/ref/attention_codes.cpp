// The 16-bit integer cache as plain loops: the definition in kernels/attention_codes.h.
#include "kernels/attention_codes.h"

#include <algorithm>
#include <cmath>

namespace setpoint {
namespace {

int32_t top_of(const float* x, int n) {
  int32_t top = 0;
  for (int i = 0; i < n; ++i) top = std::max(top, magnitude_bits(x[i]));
  return top;
}

int16_t code(float x, CodeScale by) { return by.inverse == 0.f ? int16_t{0} : code_of(x * by.inverse); }

const int16_t* codes_of(const uint8_t* page) { return reinterpret_cast<const int16_t*>(page); }
const float* scales_of(const uint8_t* page, int head_dim) { return reinterpret_cast<const float*>(page + scales_offset(head_dim)); }

// u_t of one token; `q` are codes.
float score(const int16_t* q, const uint8_t* page, int head_dim, int slot) {
  float sum = 0.f;
  for (int first = 0; first < head_dim; first += kChunk) {
    int32_t dot = 0;
    for (int d = first; d < std::min(first + kChunk, head_dim); ++d) dot += q[d] * codes_of(page)[k_code_index(d, slot)];
    sum = sum + static_cast<float>(dot);
  }
  return sum * scales_of(page, head_dim)[slot];
}

}  // namespace

void ref_kv_store_codes(const KvStoreArgs& a) {
  const int head_dim = a.kv.head_dim;
  for (int row = 0; row < a.rows; ++row) {
    const int token = a.position + row, slot = token % kPageTokens;
    for (int head = 0; head < a.kv.kv_heads; ++head) {
      const size_t page = page_offset(a.kv, a.block_table[token / kPageTokens], head);
      const float* k = a.k + row * a.k_stride + static_cast<size_t>(head) * head_dim;
      const float* v = a.v + row * a.v_stride + static_cast<size_t>(head) * head_dim;
      const CodeScale k_scale = code_scale(top_of(k, head_dim)), v_scale = code_scale(top_of(v, head_dim));
      for (int d = 0; d < head_dim; ++d) {
        reinterpret_cast<int16_t*>(a.kv.k + page)[k_code_index(d, slot)] = code(k[d], k_scale);
        reinterpret_cast<int16_t*>(a.kv.v + page)[v_code_index(head_dim, slot, d)] = code(v[d], v_scale);
      }
      reinterpret_cast<float*>(a.kv.k + page + scales_offset(head_dim))[slot] = k_scale.scale;
      reinterpret_cast<float*>(a.kv.v + page + scales_offset(head_dim))[slot] = v_scale.scale;
    }
  }
}

void ref_add_block_codes(const AttentionArgs& a, int kv_head, const float* q, int start, TokenRange visible, float& m, float& l, float* o) {
  const int head_dim = a.kv.head_dim;
  const auto page = [&](const uint8_t* base, int token) { return base + page_offset(a.kv, a.block_table[token / kPageTokens], kv_head); };
  int16_t q_codes[kMostCodeHeadDim];
  const CodeScale q_scale = code_scale(top_of(q, head_dim));
  for (int d = 0; d < head_dim; ++d) q_codes[d] = code(q[d], q_scale);
  const float s = score_scale(q_scale.scale, a.scale);

  float p[kBlockTokens] = {}, w[kBlockTokens] = {}, m_new = m;
  for (int t = visible.begin; t < visible.end; ++t) {
    p[t - start] = score(q_codes, page(a.kv.k, t), head_dim, t % kPageTokens);
    const float scaled = p[t - start] * s;
    if (scaled > m_new) m_new = scaled;
  }
  m_new = m_new + 0.f;
  for (int t = visible.begin; t < visible.end; ++t) {
    p[t - start] = exp2_scalar(std::fma(p[t - start], s, -m_new));
    w[t - start] = p[t - start] * scales_of(page(a.kv.v, t), head_dim)[t % kPageTokens];
  }
  const float c = exp2_scalar(m - m_new);
  m = m_new;
  l = std::fma(l, c, sum_of_block(p));

  const CodeScale weight = code_scale(top_of(w, kBlockTokens));
  for (int d = 0; d < head_dim; ++d) {
    o[d] = o[d] * c;
    for (int half = start; half < start + kBlockTokens; half += kChunk) {
      int32_t sum = 0;
      for (int t = std::max(half, visible.begin); t < std::min(half + kChunk, visible.end); ++t)
        sum += code(w[t - start], weight) * codes_of(page(a.kv.v, t))[v_code_index(head_dim, t % kPageTokens, d)];
      o[d] = std::fma(static_cast<float>(sum), weight.scale, o[d]);
    }
  }
}

}  // namespace setpoint
