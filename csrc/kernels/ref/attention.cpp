// Paged attention as plain loops: the definition in kernels/attention.h, one (row, head) at a time.
#include "kernels/attention_codes.h"

#include <cmath>
#include <limits>

namespace setpoint {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float read(KvFormat format, const uint8_t* page, int index) {
  if (format == KvFormat::f32) return reinterpret_cast<const float*>(page)[index];
  const uint16_t half = reinterpret_cast<const uint16_t*>(page)[index];
  return format == KvFormat::f16 ? float_from_f16(half) : float_from_bf16(half);
}

void write(KvFormat format, uint8_t* page, int index, float x) {
  if (format == KvFormat::f32)
    reinterpret_cast<float*>(page)[index] = x;
  else
    reinterpret_cast<uint16_t*>(page)[index] = format == KvFormat::f16 ? f16_from_float(x) : bf16_from_float(x);
}

struct State {  // (m, l, o) of one row and head
  float m = kMinusInfinity, l = 0.f;
  float* o;  // [head_dim]

  State(float* storage, int head_dim) : o(storage) {
    for (int d = 0; d < head_dim; ++d) o[d] = 0.f;
  }
};

// Adds the tokens of `visible`, all in the 64-token block that starts at `start`, to the state.
void add_block(const AttentionArgs& a, int kv_head, const float* q, int start, TokenRange visible, State& state) {
  const int head_dim = a.kv.head_dim;
  float p[kBlockTokens] = {};  // scores, then probabilities; 0 where masked
  float m = state.m;
  for (int t = visible.begin; t < visible.end; ++t) {
    const uint8_t* k = a.kv.k + page_offset(a.kv, a.block_table[t / kPageTokens], kv_head);
    float dot = 0.f;
    for (int d = 0; d < head_dim; ++d) dot = std::fma(q[d], read(a.kv.format, k, d * kPageTokens + t % kPageTokens), dot);
    p[t - start] = dot * a.scale;
    if (p[t - start] > m) m = p[t - start];
  }
  m = m + 0.f;
  for (int t = visible.begin; t < visible.end; ++t) p[t - start] = exp_scalar(p[t - start] - m);

  const float c = exp_scalar(state.m - m);
  for (int d = 0; d < head_dim; ++d) state.o[d] = state.o[d] * c;
  for (int t = visible.begin; t < visible.end; ++t) {
    const uint8_t* v = a.kv.v + page_offset(a.kv, a.block_table[t / kPageTokens], kv_head);
    for (int d = 0; d < head_dim; ++d)
      state.o[d] = std::fma(p[t - start], read(a.kv.format, v, t % kPageTokens * head_dim + d), state.o[d]);
  }
  state.m = m;
  state.l = std::fma(state.l, c, sum_of_block(p));
}

void add_split(State& total, int head_dim, float m, float l, const float* o) {
  if (l == 0.f) return;  // saw no token (else l >= 1, or NaN, which must reach the result)
  const float m_new = m > total.m ? m : total.m;
  const float before = exp_scalar(total.m - m_new), factor = exp_scalar(m - m_new);
  total.m = m_new;
  total.l = std::fma(total.l, before, l * factor);
  for (int d = 0; d < head_dim; ++d) total.o[d] = std::fma(total.o[d], before, o[d] * factor);
}

void write_result(const State& total, int head_dim, float* out) {
  for (int d = 0; d < head_dim; ++d) out[d] = total.l == 0.f ? 0.f : total.o[d] / total.l;
}

}  // namespace

size_t attention_scratch_floats(int rows, int heads, int head_dim) {
  const size_t queries = static_cast<size_t>(rows) * heads;
  return queries * (4 * padded_head_dim(head_dim) + kBlockTokens + kAttentionTileFloats + 4) + 2 * kLane16;  // see x86/attention_walk.h
}

void ref_kv_store(const KvStoreArgs& a) {
  if (a.kv.format == KvFormat::s16) return ref_kv_store_codes(a);
  const int head_dim = a.kv.head_dim;
  for (int row = 0; row < a.rows; ++row) {
    const int token = a.position + row, slot = token % kPageTokens;
    for (int head = 0; head < a.kv.kv_heads; ++head) {
      const size_t page = page_offset(a.kv, a.block_table[token / kPageTokens], head);
      const float* k = a.k + row * a.k_stride + static_cast<size_t>(head) * head_dim;
      const float* v = a.v + row * a.v_stride + static_cast<size_t>(head) * head_dim;
      for (int d = 0; d < head_dim; ++d) {
        write(a.kv.format, a.kv.k + page, d * kPageTokens + slot, k[d]);
        write(a.kv.format, a.kv.v + page, slot * head_dim + d, v[d]);
      }
    }
  }
}

void ref_attention(const AttentionArgs& a) {
  const int head_dim = a.kv.head_dim, heads = heads_of(a);
  const bool codes = a.kv.format == KvFormat::s16;
  for (int row = 0; row < a.rows; ++row) {
    const TokenRange visible = TokenRange::visible(a.position + row, a.window);
    for (int h = 0; h < heads; ++h) {
      const int kv_head = a.kv_head_begin + h / a.group;
      const size_t first = (static_cast<size_t>(a.kv_head_begin) * a.group + h) * head_dim;
      State total(a.scratch, head_dim);
      for (int s = a.split_begin; s < a.split_end; ++s) {
        State split(a.scratch + head_dim, head_dim);
        for (int start = s * kSplitTokens; start < (s + 1) * kSplitTokens; start += kBlockTokens) {
          const TokenRange block = visible.within(start, start + kBlockTokens);
          if (block.empty()) continue;
          const float* q = a.q + row * a.q_stride + first;
          if (codes)
            ref_add_block_codes(a, kv_head, q, start, block, split.m, split.l, split.o);
          else
            add_block(a, kv_head, q, start, block, split);
        }
        if (codes) split.m = split.m * kLn2;
        for (int d = 0; d < head_dim; ++d) split.o[d] = split.o[d] + 0.f;
        if (a.partial == nullptr) {
          add_split(total, head_dim, split.m, split.l, split.o);
          continue;
        }
        float* entry = partial_entry(a, row, h, s);
        entry[0] = split.m;
        entry[1] = split.l;
        for (int d = 0; d < head_dim; ++d) entry[2 + d] = split.o[d];
      }
      if (a.partial == nullptr) write_result(total, head_dim, a.out + row * a.out_stride + first);
    }
  }
}

void ref_attention_merge(const float* partial, int rows, int heads, int splits, int head_dim, float* out, size_t out_stride) {
  const size_t entry_floats = static_cast<size_t>(head_dim) + 2;
  for (int row = 0; row < rows; ++row)
    for (int h = 0; h < heads; ++h) {
      const float* entry = partial + (static_cast<size_t>(row) * heads + h) * splits * entry_floats;
      float* result = out + row * out_stride + static_cast<size_t>(h) * head_dim;
      State total(result, head_dim);  // gathers in place: `out` does not overlap `partial`
      for (int s = 0; s < splits; ++s, entry += entry_floats) add_split(total, head_dim, entry[0], entry[1], entry + 2);
      write_result(total, head_dim, result);
    }
}

}  // namespace setpoint
