// Blocks of integer K and V over Lanes: kernels/attention_codes.h. Loops and registers are those of attention_lanes.h, with
// pairs of products where that has one: a vector holds 16-bit codes of 2 dims x kLanes tokens, or 2 tokens x kLanes dims.
#pragma once
#include <cstring>

namespace setpoint {
namespace {

constexpr int kChunkPages = kChunk / kPageTokens, kPagePairs = kPageTokens / 2;

SETPOINT_INLINE int32_t pair_at(const int16_t* codes) {
  int32_t pair;
  std::memcpy(&pair, codes, sizeof pair);
  return pair;
}

// n is a multiple of 8; `codes` has room for whole vectors.
SETPOINT_INLINE CodeScale quantize_row(const float* x, int n, int16_t* codes) {
  Ints top = zero_ints();
  for (int i = 0; i < n; i += kLanes) top = max_ints(top, magnitude(load_first(x + i, n - i < kLanes ? n - i : kLanes)));
  const CodeScale by = code_scale(top_int(top));
  for (int i = 0; i < n; i += kLanes) {
    const Lanes some = load_first(x + i, n - i < kLanes ? n - i : kLanes);
    store_codes(codes + i, by.inverse == 0.f ? broadcast(0.f) : mul(some, broadcast(by.inverse)));
  }
  return by;
}

// tile.p[r][page * 16 + token] = u_t for P pages from `page`.
template <int R, int P>
SETPOINT_INLINE void score_code_pages(const AttentionArgs& a, const Tile& tile, const Block& block, int page) {
  constexpr int N = P * kParts, kSums = R * N >= 8 ? 1 : R * N >= 4 ? 2 : 4;  // enough chains to hide the latency
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim);
  const uint8_t* k[P];
  const uint8_t* ahead[P];
  for (int i = 0; i < P; ++i) {
    k[i] = a.kv.k + page_offset(a.kv, block.ids[page + i], tile.kv_head);
    ahead[i] = a.kv.k + page_offset(a.kv, block.ahead[page + i], tile.kv_head);
  }
  Lanes total[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) total[r][i] = broadcast(0.f);
  for (int first = 0; first < head_dim; first += kChunk) {
    const int end = first + kChunk < head_dim ? first + kChunk : head_dim;
    Ints sum[kSums][R][N];
    for (int s = 0; s < kSums; ++s)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) sum[s][r][i] = zero_ints();
    for (int d = first; d < end; d += 2 * kSums)
      for (int s = 0; s < kSums; ++s) {
        const size_t row = static_cast<size_t>(d / 2 + s) * kPageTokens * 2 * sizeof(int16_t);
        for (int i = 0; i < P; ++i) _mm_prefetch(ahead[i] + row, _MM_HINT_T1);
        Ints key[N];
        for (int i = 0; i < N; ++i) key[i] = load_ints(k[i / kParts] + row + i % kParts * sizeof(Ints));
        for (int r = 0; r < R; ++r) {
          const Ints query = broadcast_int(pair_at(tile.q_codes + r * padded + d + 2 * s));
          for (int i = 0; i < N; ++i) sum[s][r][i] = dot_pairs(sum[s][r][i], query, key[i]);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) {
        for (int s = 1; s < kSums; ++s) sum[0][r][i] = add_ints(sum[0][r][i], sum[s][r][i]);
        total[r][i] = add(total[r][i], to_floats(sum[0][r][i]));
      }
  }
  for (int i = 0; i < N; ++i) {
    const size_t scales = scales_offset(head_dim);
    if (i % kParts == 0) {
      _mm_prefetch(ahead[i / kParts] + scales, _MM_HINT_T1);
      _mm_prefetch(a.kv.v + (ahead[i / kParts] - a.kv.k) + scales, _MM_HINT_T1);
    }
    const Lanes scale = load(reinterpret_cast<const float*>(k[i / kParts] + scales) + i % kParts * kLanes);
    for (int r = 0; r < R; ++r) store(tile.p + r * kBlockTokens + page * kPageTokens + i * kLanes, mul(total[r][i], scale));
  }
}

template <int R>
void score_codes(const AttentionArgs& a, const Tile& tile, const Block& block, int page, int end) {
  constexpr int kPages = at_most(kMaxScoreVectors / (R * kParts), kMostPages);
  while (page < end) {
    const int left = end - page;
    if (kPages >= 4 && left >= 4)
      score_code_pages<R, at_most(kPages, 4)>(a, tile, block, page), page += 4;
    else if (kPages >= 2 && left >= 2)
      score_code_pages<R, at_most(kPages, 2)>(a, tile, block, page), page += 2;
    else
      score_code_pages<R, 1>(a, tile, block, page), page += 1;
  }
}

// Turns the u of query r into w in place, 0 where masked; v_scale: of the block's tokens. Sets its new m, its sum of p, the
// exponent m - m' of the factor for l and o, and the greatest w.
SETPOINT_INLINE void soften_row(Tile& tile, int r, const Block& block, const float* const* v_scale, float& sum, float& exponent,
                                float& top_w) {
  constexpr int kVectors = kBlockTokens / kLanes;
  float* p = tile.p + r * kBlockTokens;
  sum = exponent = top_w = 0.f;
  if (tile.visible[r].within(block.start, block.start + kBlockTokens).empty()) {
    for (int i = 0; i < kVectors; ++i) store(p + i * kLanes, broadcast(0.f));
    return;
  }
  Lanes u[kVectors], top[kParts], total[kParts];
  for (int j = 0; j < kParts; ++j) top[j] = broadcast(-__builtin_inff()), total[j] = broadcast(0.f);
  for (int i = 0; i < kVectors; ++i) {
    const TokenRange lanes = visible_lanes(tile, r, block.start + i * kLanes);
    u[i] = load(p + i * kLanes);
    if (lanes.end - lanes.begin < kLanes) u[i] = select_range(lanes.begin, lanes.end, u[i], broadcast(-__builtin_inff()));
    top[i % kParts] = max(u[i], top[i % kParts]);
  }
  const float scale = tile.score_scale[r], highest = tree16_max(top) * scale;
  const float m = (highest > tile.m[r] ? highest : tile.m[r]) + 0.f;
  Ints top_bits = zero_ints();
  for (int i = 0; i < kVectors; ++i) {
    const TokenRange lanes = visible_lanes(tile, r, block.start + i * kLanes);
    Lanes value = exp2_lanes(fms(u[i], broadcast(scale), broadcast(m)));
    Lanes w = broadcast(0.f);
    if (lanes.end - lanes.begin == kLanes) {
      w = mul(value, load(v_scale[i / kParts] + i % kParts * kLanes));
    } else {
      value = select_range(lanes.begin, lanes.end, value, w);
      if (!lanes.empty()) w = select_range(lanes.begin, lanes.end, mul(value, load(v_scale[i / kParts] + i % kParts * kLanes)), w);
    }
    total[i % kParts] = add(total[i % kParts], value);
    top_bits = max_ints(top_bits, bits(w));
    store(p + i * kLanes, w);
  }
  sum = tree16_sum(total);
  const int32_t highest_w = top_int(top_bits);
  std::memcpy(&top_w, &highest_w, sizeof top_w);
  exponent = tile.m[r] - m;
  tile.m[r] = m;
}

// All queries of the tile: u to weight codes, m and l updated, the factors of o and of the codes.
void soften_codes(const AttentionArgs& a, Tile& tile, const Block& block) {
  alignas(64) float sum[kLanes] = {}, exponent[kLanes] = {}, top[kLanes] = {}, inverse[kLanes];
  const float* v_scale[kMostPages];
  for (int page = block.first_page; page < block.last_page; ++page)
    v_scale[page] =
        reinterpret_cast<const float*>(a.kv.v + page_offset(a.kv, block.ids[page], tile.kv_head) + scales_offset(a.kv.head_dim));
  for (int r = 0; r < tile.count; ++r) soften_row(tile, r, block, v_scale, sum[r], exponent[r], top[r]);
  const Lanes factor = exp2_lanes(load(exponent));
  store_first(tile.c, tile.count, factor);
  store(tile.l, fma(load(tile.l), factor, load(sum)));
  const Lanes tops = load(top), limit = broadcast(kSmallestTop);  // tops are finite or NaN, which times 0 is NaN
  store_first(tile.weight_scale, tile.count, where_at_least(tops, limit, div(tops, broadcast(kLargestCode)), mul(tops, broadcast(0.f))));
  store(inverse, where_at_least(tops, limit, div(broadcast(kLargestCode), tops), broadcast(0.f)));
  for (int r = 0; r < tile.count; ++r) {
    float* p = tile.p + r * kBlockTokens;
    int16_t* codes = reinterpret_cast<int16_t*>(p);  // half as wide: never ahead of what is still read
    for (int i = 0; i < kBlockTokens; i += kLanes) store_codes(codes + i, mul(load(p + i), broadcast(inverse[r])));
  }
}

// o[r][d] = o[r][d] * c[r] before the block's first page, then each half's sum, for C vectors from `d`. The pages [page, end)
// lie in one half; what a later call will add to its sum waits in tile.sums.
template <int R, int C, bool Tail>
SETPOINT_INLINE void weigh_code_columns(const AttentionArgs& a, const Tile& tile, const Block& block, int d, int page, int end) {
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim);
  const size_t pair_bytes = static_cast<size_t>(head_dim) * 2 * sizeof(int16_t), offset = static_cast<size_t>(d) * 2 * sizeof(int16_t);
  const int half_begin = page - page % kChunkPages, half_end = half_begin + kChunkPages;
  const bool starts = page == half_begin || page == block.first_page, ends = end == half_end || end == block.last_page;
  const int16_t* codes[R];
  for (int r = 0; r < R; ++r) codes[r] = reinterpret_cast<const int16_t*>(tile.p + r * kBlockTokens);
  Ints sum[R][C];  // o waits in memory: the registers are full
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) sum[r][i] = starts ? zero_ints() : load_ints(tile.sums + r * padded + d + i * kLanes);
  const uint8_t *v = nullptr, *ahead = nullptr;
  for (int pair = page * kPagePairs; pair < end * kPagePairs; ++pair, v += pair_bytes, ahead += pair_bytes) {
    if (pair % kPagePairs == 0) {
      v = a.kv.v + page_offset(a.kv, block.ids[pair / kPagePairs], tile.kv_head) + offset;
      ahead = a.kv.v + page_offset(a.kv, block.ahead[pair / kPagePairs], tile.kv_head) + offset;
    }
    for (size_t byte = 0; byte < C * sizeof(Ints); byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
    Ints value[C];
    for (int i = 0; i < C; ++i) value[i] = Tail ? load_first_ints(v, head_dim - d) : load_ints(v + i * sizeof(Ints));
    for (int r = 0; r < R; ++r) {
      const Ints weight = broadcast_int(pair_at(codes[r] + 2 * pair));
      for (int i = 0; i < C; ++i) sum[r][i] = dot_pairs(sum[r][i], weight, value[i]);
    }
  }
  if (!ends) {
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i) store_ints(tile.sums + r * padded + d + i * kLanes, sum[r][i]);
    return;
  }
  const bool first = half_begin <= block.first_page;
  for (int r = 0; r < R; ++r) {
    const Lanes c = broadcast(first ? tile.c[r] : 1.f), scale = broadcast(tile.weight_scale[r]);
    float* o = tile.o + r * padded + d;
    for (int i = 0; i < C; ++i) store(o + i * kLanes, fma(to_floats(sum[r][i]), scale, mul(load(o + i * kLanes), c)));
  }
}

template <int R>
void weigh_codes(const AttentionArgs& a, const Tile& tile, const Block& block, int page, int end) {
  constexpr int kColumns = at_most(kMaxOutVectors / R, 4);
  const int head_dim = a.kv.head_dim;
  while (page < end) {
    const int half_end = page - page % kChunkPages + kChunkPages, stop = half_end < end ? half_end : end;
    int d = 0;
    for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes) weigh_code_columns<R, kColumns, false>(a, tile, block, d, page, stop);
    for (; d + kLanes <= head_dim; d += kLanes) weigh_code_columns<R, 1, false>(a, tile, block, d, page, stop);
    if (d < head_dim) weigh_code_columns<R, 1, true>(a, tile, block, d, page, stop);
    page = stop;
  }
}

}  // namespace
}  // namespace setpoint
