// Rows of K and V into their pages over Lanes, rounded as math.h does it.
#pragma once
#include <type_traits>

namespace setpoint {
namespace {

// K is converted a row at a time, then spread over its page: one token is one column of [head_dim][16].
template <KvFormat F>
void store_row(const float* k, const float* v, int head_dim, int slot, uint8_t* k_page, uint8_t* v_page) {
  using Element = std::conditional_t<F == KvFormat::f32, uint32_t, uint16_t>;
  for (int d = 0; d < head_dim; d += kLanes) {
    const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
    store_kv_first<F>(v_page, static_cast<size_t>(slot) * head_dim + d, n, load_first(v + d, n));
    alignas(64) Element column[kLanes];
    store_kv<F>(reinterpret_cast<uint8_t*>(column), 0, load_first(k + d, n));  // unmasked: masked stores do not forward
    Element* page = reinterpret_cast<Element*>(k_page) + d * kPageTokens + slot;
    for (int i = 0; i < n; ++i) page[i * kPageTokens] = column[i];
  }
}

template <KvFormat F>
void kv_store_of(const KvStoreArgs& a) {
  const int head_dim = a.kv.head_dim;
  for (int row = 0; row < a.rows; ++row)
    for (int head = 0; head < a.kv.kv_heads; ++head) {
      const size_t offset = static_cast<size_t>(head) * head_dim;
      const int token = a.position + row;
      const size_t page = page_offset(a.kv, a.block_table[token / kPageTokens], head);
      store_row<F>(a.k + row * a.k_stride + offset, a.v + row * a.v_stride + offset, head_dim, token % kPageTokens, a.kv.k + page,
                   a.kv.v + page);
    }
}

// A token's codes are every other 16 bits of its V page's row: two neighbours of one call are written together, a single
// token beside what another thread may be writing.
SETPOINT_INLINE void store_v_codes(const int16_t* first, const int16_t* second, int head_dim, int16_t* v) {
  for (int d = 0; d < head_dim; ++d) {
    v[2 * d] = first[d];
    v[2 * d + 1] = second[d];
  }
}

void kv_store_codes(const KvStoreArgs& a) {
  const int head_dim = a.kv.head_dim;
  const size_t scales = scales_offset(head_dim);
  alignas(64) int16_t codes[2][kMostCodeHeadDim];
  for (int row = 0; row < a.rows;) {
    const int token = a.position + row, slot = token % kPageTokens, together = slot % 2 == 0 && row + 1 < a.rows ? 2 : 1;
    for (int head = 0; head < a.kv.kv_heads; ++head) {
      const size_t offset = static_cast<size_t>(head) * head_dim;
      const size_t page = page_offset(a.kv, a.block_table[token / kPageTokens], head);
      int16_t *k = reinterpret_cast<int16_t*>(a.kv.k + page), *v = reinterpret_cast<int16_t*>(a.kv.v + page);
      float *k_scales = reinterpret_cast<float*>(a.kv.k + page + scales), *v_scales = reinterpret_cast<float*>(a.kv.v + page + scales);
      for (int i = 0; i < together; ++i) {
        k_scales[slot + i] = quantize_row(a.k + (row + i) * a.k_stride + offset, head_dim, codes[0]).scale;
        for (int d = 0; d < head_dim; d += 2) std::memcpy(k + k_code_index(d, slot + i), codes[0] + d, 2 * sizeof(int16_t));
      }
      for (int i = 0; i < together; ++i) v_scales[slot + i] = quantize_row(a.v + (row + i) * a.v_stride + offset, head_dim, codes[i]).scale;
      if (together == 2)
        store_v_codes(codes[0], codes[1], head_dim, v + v_code_index(head_dim, slot, 0));
      else
        for (int d = 0; d < head_dim; ++d) v[v_code_index(head_dim, slot, d)] = codes[0][d];
    }
    row += together;
  }
}

void kv_store(const KvStoreArgs& a) {
  if (a.kv.head_dim % 8 != 0) return ref_kv_store(a);
  switch (a.kv.format) {
    case KvFormat::f32:
      return kv_store_of<KvFormat::f32>(a);
    case KvFormat::f16:
      return kv_store_of<KvFormat::f16>(a);
    case KvFormat::bf16:
      return kv_store_of<KvFormat::bf16>(a);
    case KvFormat::s16:
      return kv_store_codes(a);
  }
}

}  // namespace
}  // namespace setpoint
