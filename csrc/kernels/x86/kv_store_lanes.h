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

// A token's codes are every other 16 bits of its K page's column and of its V page's row: written one by one, never the
// neighbours', which another thread may be writing.
void kv_store_codes(const KvStoreArgs& a) {
  const int head_dim = a.kv.head_dim;
  alignas(64) int16_t codes[kMostCodeHeadDim];
  for (int row = 0; row < a.rows; ++row)
    for (int head = 0; head < a.kv.kv_heads; ++head) {
      const size_t offset = static_cast<size_t>(head) * head_dim, scales = scales_offset(head_dim);
      const int token = a.position + row, slot = token % kPageTokens;
      const size_t page = page_offset(a.kv, a.block_table[token / kPageTokens], head);
      int16_t* k = reinterpret_cast<int16_t*>(a.kv.k + page);
      reinterpret_cast<float*>(a.kv.k + page + scales)[slot] = quantize_row(a.k + row * a.k_stride + offset, head_dim, codes).scale;
      for (int d = 0; d < head_dim; d += 2) std::memcpy(k + k_code_index(d, slot), codes + d, 2 * sizeof(int16_t));
      int16_t* v = reinterpret_cast<int16_t*>(a.kv.v + page);
      reinterpret_cast<float*>(a.kv.v + page + scales)[slot] = quantize_row(a.v + row * a.v_stride + offset, head_dim, codes).scale;
      for (int d = 0; d < head_dim; ++d) v[v_code_index(head_dim, slot, d)] = codes[d];
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
