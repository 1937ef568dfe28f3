// Blocks of float K and V: the scores, probabilities and weighted sums of kernels/attention.h over Lanes.
//
// Registers hold scores of R queries x P pages (lanes are the 16 tokens of a page), then o of R queries x C vectors of the
// head. Including files set the register budgets kMaxScoreVectors, kMaxOutVectors.
#pragma once

namespace setpoint {
namespace {

// tile.p[r][page * 16 + token] for P pages from `page`: d ascending, one accumulator per (query, token).
template <KvFormat F, int R, int P>
SETPOINT_INLINE void score_pages(const AttentionArgs& a, const Tile& tile, const Block& block, int page) {
  constexpr int N = P * kParts;
  const uint8_t* k[P];
  const uint8_t* ahead[P];
  for (int i = 0; i < P; ++i) {
    k[i] = a.kv.k + page_offset(a.kv, block.ids[page + i], tile.kv_head);
    ahead[i] = a.kv.k + page_offset(a.kv, block.ahead[page + i], tile.kv_head);
  }
  const float* q[R];
  for (int r = 0; r < R; ++r) q[r] = tile.q[r];
  Lanes dot[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) dot[r][i] = broadcast(0.f);
  for (int d = 0; d < a.kv.head_dim; ++d) {
    constexpr int kPerLine = 4 / kv_element_bytes(F);  // d steps
    if (kPerLine == 1 || d % 2 == 0)
      for (int i = 0; i < P; ++i) _mm_prefetch(ahead[i] + d / kPerLine * 64, _MM_HINT_T1);
    Lanes key[N];
    for (int i = 0; i < N; ++i) key[i] = load_kv<F>(k[i / kParts], static_cast<size_t>(d) * kPageTokens + i % kParts * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes query = broadcast(q[r][d]);
      for (int i = 0; i < N; ++i) dot[r][i] = fma(query, key[i], dot[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) store(tile.p + r * kBlockTokens + page * kPageTokens + i * kLanes, dot[r][i]);
}

template <KvFormat F, int R>
void score_floats(const AttentionArgs& a, const Tile& tile, const Block& block, int page, int end) {
  constexpr int kPages = at_most(kMaxScoreVectors / (R * kParts), kMostPages);
  while (page < end) {
    const int left = end - page;
    if (kPages >= 4 && left >= 4)
      score_pages<F, R, at_most(kPages, 4)>(a, tile, block, page), page += 4;
    else if (kPages >= 2 && left >= 2)
      score_pages<F, R, at_most(kPages, 2)>(a, tile, block, page), page += 2;
    else
      score_pages<F, R, 1>(a, tile, block, page), page += 1;
  }
}

// Turns the scores of query r into probabilities in place, 0 where masked. Sets its new m, its sum of p, and the
// exponent m - m' of the factor for l and o.
SETPOINT_INLINE void softmax_row(Tile& tile, int r, int start, float scale, float* p, float& sum, float& exponent) {
  constexpr int kVectors = kBlockTokens / kLanes;
  sum = exponent = 0.f;
  if (tile.visible[r].within(start, start + kBlockTokens).empty()) {  // state stays: factor exp(0), nothing added
    for (int i = 0; i < kVectors; ++i) store(p + i * kLanes, broadcast(0.f));
    return;
  }
  Lanes score[kVectors], top[kParts], total[kParts];
  for (int j = 0; j < kParts; ++j) top[j] = broadcast(tile.m[r]), total[j] = broadcast(0.f);
  for (int i = 0; i < kVectors; ++i) {
    const TokenRange lanes = visible_lanes(tile, r, start + i * kLanes);
    score[i] = mul(load(p + i * kLanes), broadcast(scale));
    if (lanes.end - lanes.begin < kLanes) score[i] = select_range(lanes.begin, lanes.end, score[i], broadcast(-__builtin_inff()));
    top[i % kParts] = max(score[i], top[i % kParts]);
  }
  const float m = tree16_max(top) + 0.f;
  for (int i = 0; i < kVectors; ++i) {
    const Lanes value = exp_lanes(sub(score[i], broadcast(m)));
    total[i % kParts] = add(total[i % kParts], value);
    store(p + i * kLanes, value);
  }
  sum = tree16_sum(total);
  exponent = tile.m[r] - m;
  tile.m[r] = m;
}

// All queries of the tile: scores to probabilities, m and l updated, c the factor of o.
void soften_floats(const AttentionArgs& a, Tile& tile, const Block& block) {
  alignas(64) float sum[kLanes] = {}, exponent[kLanes] = {};
  for (int r = 0; r < tile.count; ++r) softmax_row(tile, r, block.start, a.scale, tile.p + r * kBlockTokens, sum[r], exponent[r]);
  const Lanes factor = exp_lanes(load(exponent));
  store_first(tile.c, tile.count, factor);
  store(tile.l, fma(load(tile.l), factor, load(sum)));
}

// o[r][d] = o[r][d] * c[r] before the block's first page, then fma(p[r][t], v[t][d], o[r][d]) with t ascending, for C vectors
// from `d`. Tail: the last vector of a head whose size is no multiple of kLanes.
template <KvFormat F, int R, int C, bool Tail>
SETPOINT_INLINE void weigh_columns(const AttentionArgs& a, const Tile& tile, const Block& block, int d, int page, int end) {
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim);
  Lanes out[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) out[r][i] = load(tile.o + r * padded + d + i * kLanes);
  if (page == block.first_page)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i) out[r][i] = mul(out[r][i], broadcast(tile.c[r]));
  for (; page < end; ++page) {
    const int page_start = block.start + page * kPageTokens;
    const TokenRange tokens = block.range.within(page_start, page_start + kPageTokens);
    const float* weights = tile.p + page * kPageTokens;
    const uint8_t* v = a.kv.v + page_offset(a.kv, block.ids[page], tile.kv_head);
    const uint8_t* ahead = a.kv.v + page_offset(a.kv, block.ahead[page], tile.kv_head);
    for (int t = tokens.begin - page_start; t < tokens.end - page_start; ++t) {
      for (size_t byte = 0; byte < C * kLanes * kv_element_bytes(F); byte += 64)
        _mm_prefetch(ahead + (static_cast<size_t>(t) * head_dim + d) * kv_element_bytes(F) + byte, _MM_HINT_T1);
      Lanes value[C];
      for (int i = 0; i < C; ++i) {
        const size_t element = static_cast<size_t>(t) * head_dim + d + i * kLanes;
        value[i] = Tail ? load_kv_first<F>(v, element, head_dim - d) : load_kv<F>(v, element);
      }
      for (int r = 0; r < R; ++r) {
        const Lanes weight = broadcast(weights[r * kBlockTokens + t]);
        for (int i = 0; i < C; ++i) out[r][i] = fma(weight, value[i], out[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) store(tile.o + r * padded + d + i * kLanes, out[r][i]);
}

template <KvFormat F, int R>
void weigh_floats(const AttentionArgs& a, const Tile& tile, const Block& block, int page, int end) {
  constexpr int kColumns = at_most(kMaxOutVectors / R, 4);
  const int head_dim = a.kv.head_dim;
  int d = 0;
  for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes) weigh_columns<F, R, kColumns, false>(a, tile, block, d, page, end);
  for (; d + kLanes <= head_dim; d += kLanes) weigh_columns<F, R, 1, false>(a, tile, block, d, page, end);
  if (d < head_dim) weigh_columns<F, R, 1, true>(a, tile, block, d, page, end);
}

}  // namespace
}  // namespace setpoint
