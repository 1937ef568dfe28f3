// Paged attention over Lanes: the bits of kernels/attention.h, for every ISA.
//
// Queries, the (row, head) pairs of a call, are taken in tiles of up to kAttentionTileQueries that share each load of K and V:
// registers hold scores of R queries x P pages (lanes are the 16 tokens of a page), then o of R queries x C vectors
// of the head. The loop is split, tile, block: a split's K and V stay in L2 while the tiles pass over it.
// Including files set the register budgets kMaxScoreVectors, kMaxOutVectors.
#pragma once

namespace setpoint {
namespace {

constexpr int kMostPages = kBlockTokens / kPageTokens;
constexpr int kMostQueries = kLanes;  // of a tile; one vector holds a float for each
static_assert(kAttentionTileQueries <= kMostQueries);
constexpr float kMinusInfinity = -__builtin_inff();

struct Tile {
  int count;                                  // queries, consecutive (row, head) pairs
  const float* q[kAttentionTileQueries];      // [head_dim] each
  TokenRange visible[kAttentionTileQueries];  // begin and end never fall from one query to the next
  float m[kMostQueries], l[kMostQueries];
  float* o;  // [count][padded head_dim]
};

struct Block {       // the pages of one 64-token block that a tile needs
  int start;         // first token of the block
  TokenRange range;  // tokens some query of the tile sees, inside the block
  int first_page, last_page;
  const uint8_t* k[kMostPages];
  const uint8_t* v[kMostPages];
  const uint8_t* next_k[kMostPages];  // of the block after it, to prefetch; always readable addresses
  const uint8_t* next_v[kMostPages];
};

constexpr int at_most(int limit, int wanted) { return wanted <= limit ? wanted : at_most(limit, wanted / 2); }

// Pages lie scattered and are short, so the hardware sees no stream: while a block is scored, the next one is fetched,
// a page of K and of V by cache lines over the steps of d.
template <KvFormat F>
SETPOINT_INLINE void prefetch_next(const Block& block, int page, int d) {
  if constexpr (F == KvFormat::f32) {
    _mm_prefetch(block.next_k[page] + d * 64, _MM_HINT_T0);
    _mm_prefetch(block.next_v[page] + d * 64, _MM_HINT_T0);
  } else {
    _mm_prefetch((d % 2 == 0 ? block.next_k : block.next_v)[page] + d / 2 * 64, _MM_HINT_T0);
  }
}

// scores[r][page * 16 + token] for P pages from `page`: d ascending, one accumulator per (query, token).
template <KvFormat F, int R, int P>
SETPOINT_INLINE void score_pages(const Tile& tile, const Block& block, int page, int head_dim, float* scores) {
  constexpr int N = P * kParts;
  const uint8_t* k[P];
  for (int i = 0; i < P; ++i) k[i] = block.k[page + i];
  const float* q[R];
  for (int r = 0; r < R; ++r) q[r] = tile.q[r];
  Lanes dot[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) dot[r][i] = broadcast(0.f);
  for (int d = 0; d < head_dim; ++d) {
    for (int i = 0; i < P; ++i) prefetch_next<F>(block, page + i, d);
    Lanes key[N];
    for (int i = 0; i < N; ++i) key[i] = load_kv<F>(k[i / kParts], static_cast<size_t>(d) * kPageTokens + i % kParts * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes query = broadcast(q[r][d]);
      for (int i = 0; i < N; ++i) dot[r][i] = fma(query, key[i], dot[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) store(scores + r * kBlockTokens + page * kPageTokens + i * kLanes, dot[r][i]);
}

template <KvFormat F, int R>
void score_block(const Tile& tile, const Block& block, int head_dim, float* scores) {
  constexpr int kPages = at_most(kMaxScoreVectors / (R * kParts), kMostPages);
  for (int page = block.first_page; page < block.last_page;) {
    const int left = block.last_page - page;
    if (kPages >= 4 && left >= 4)
      score_pages<F, R, at_most(kPages, 4)>(tile, block, page, head_dim, scores), page += 4;
    else if (kPages >= 2 && left >= 2)
      score_pages<F, R, at_most(kPages, 2)>(tile, block, page, head_dim, scores), page += 2;
    else
      score_pages<F, R, 1>(tile, block, page, head_dim, scores), page += 1;
  }
}

// Limits of query r's visible lanes in the vector of tokens that starts at `token`.
SETPOINT_INLINE TokenRange visible_lanes(const Tile& tile, int r, int token) {
  const TokenRange seen = tile.visible[r].within(token, token + kLanes);
  return seen.empty() ? TokenRange{0, 0} : TokenRange{seen.begin - token, seen.end - token};
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
    if (lanes.end - lanes.begin < kLanes) score[i] = select_range(lanes.begin, lanes.end, score[i], broadcast(kMinusInfinity));
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
template <int R>
SETPOINT_INLINE void softmax_block(Tile& tile, int start, float scale, float* p, float* c) {
  alignas(64) float sum[kMostQueries] = {}, exponent[kMostQueries] = {};
  for (int r = 0; r < R; ++r) softmax_row(tile, r, start, scale, p + r * kBlockTokens, sum[r], exponent[r]);
  const Lanes factor = exp_lanes(load(exponent));
  store(c, factor);
  store(tile.l, fma(load(tile.l), factor, load(sum)));
}

// o[r][d] = o[r][d] * c[r], then fma(p[r][t], v[t][d], o[r][d]) with t ascending, for C vectors from `d`.
// Tail: the last vector of a head whose size is no multiple of kLanes.
template <KvFormat F, int R, int C, bool Tail>
SETPOINT_INLINE void weigh_columns(const Tile& tile, const Block& block, int d, int head_dim, const float* c, const float* p) {
  const int padded = padded_head_dim(head_dim);
  Lanes out[R][C];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < C; ++i) out[r][i] = mul(load(tile.o + r * padded + d + i * kLanes), broadcast(c[r]));
  for (int page = block.first_page; page < block.last_page; ++page) {
    const int page_start = block.start + page * kPageTokens;
    const TokenRange tokens = block.range.within(page_start, page_start + kPageTokens);
    const float* weights = p + page * kPageTokens;
    const uint8_t* v = block.v[page];
    for (int t = tokens.begin - page_start; t < tokens.end - page_start; ++t) {
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
void weigh_block(const Tile& tile, const Block& block, int head_dim, const float* c, const float* p) {
  constexpr int kColumns = at_most(kMaxOutVectors / R, 4);
  int d = 0;
  for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes) weigh_columns<F, R, kColumns, false>(tile, block, d, head_dim, c, p);
  for (; d + kLanes <= head_dim; d += kLanes) weigh_columns<F, R, 1, false>(tile, block, d, head_dim, c, p);
  if (d < head_dim) weigh_columns<F, R, 1, true>(tile, block, d, head_dim, c, p);
}

template <KvFormat F, int R>
void add_block(const AttentionArgs& a, Tile& tile, const Block& block) {
  alignas(64) float p[R * kBlockTokens];
  alignas(64) float c[kMostQueries];
  score_block<F, R>(tile, block, a.kv.head_dim, p);
  softmax_block<R>(tile, block.start, a.scale, p, c);
  weigh_block<F, R>(tile, block, a.kv.head_dim, c, p);
}

template <KvFormat F>
void add_block(const AttentionArgs& a, Tile& tile, const Block& block) {
  static_assert(kAttentionTileQueries == 6);
  switch (tile.count) {
    case 1:
      return add_block<F, 1>(a, tile, block);
    case 2:
      return add_block<F, 2>(a, tile, block);
    case 3:
      return add_block<F, 3>(a, tile, block);
    case 4:
      return add_block<F, 4>(a, tile, block);
    case 5:
      return add_block<F, 5>(a, tile, block);
    default:
      return add_block<F, 6>(a, tile, block);
  }
}

SETPOINT_INLINE void find_pages(const AttentionArgs& a, TokenRange range, int start, const uint8_t** k, const uint8_t** v) {
  for (int token = range.begin - range.begin % kPageTokens; token < range.end; token += kPageTokens) {
    const size_t byte = page_element(a.kv, a.block_table, a.kv_head, token) * kv_element_bytes(a.kv.format);
    k[(token - start) / kPageTokens] = a.kv.k + byte;
    v[(token - start) / kPageTokens] = a.kv.v + byte;
  }
}

// The pages of the tile's block at `start`, and of the one after it.
SETPOINT_INLINE void find_block(const AttentionArgs& a, TokenRange seen, int start, Block& block) {
  block.start = start;
  block.range = seen.within(start, start + kBlockTokens);
  block.first_page = (block.range.begin - start) / kPageTokens;
  block.last_page = (block.range.end - start + kPageTokens - 1) / kPageTokens;
  find_pages(a, block.range, start, block.k, block.v);
  for (int page = block.first_page; page < block.last_page; ++page) block.next_k[page] = block.k[page], block.next_v[page] = block.v[page];
  const int after = start + kBlockTokens;
  find_pages(a, seen.within(after, after + kBlockTokens), after, block.next_k, block.next_v);
}

template <KvFormat F>
void run_split(const AttentionArgs& a, Tile& tile, int split) {
  const int padded = padded_head_dim(a.kv.head_dim);
  for (int r = 0; r < kMostQueries; ++r) tile.m[r] = kMinusInfinity, tile.l[r] = 0.f;
  for (int i = 0; i < tile.count * padded; i += kLanes) store(tile.o + i, broadcast(0.f));
  const TokenRange seen{tile.visible[0].begin, tile.visible[tile.count - 1].end};
  const TokenRange tokens = seen.within(split * kSplitTokens, (split + 1) * kSplitTokens);
  Block block;
  for (int start = tokens.begin - tokens.begin % kBlockTokens; start < tokens.end; start += kBlockTokens) {
    find_block(a, seen, start, block);
    add_block<F>(a, tile, block);
  }
  for (int i = 0; i < tile.count * padded; i += kLanes) store(tile.o + i, add(load(tile.o + i), broadcast(0.f)));
}

// The running total of one query: M, L and O[head_dim] of the splits so far.
struct Total {
  float m, l;
};

SETPOINT_INLINE void add_split(Total& total, float* total_o, float m, float l, const float* o, int head_dim) {
  if (l == 0.f) return;  // saw no token
  const float m_new = m > total.m ? m : total.m;
  const float before = exp_scalar(total.m - m_new), factor = exp_scalar(m - m_new);
  total.m = m_new;
  total.l = __builtin_fmaf(total.l, before, l * factor);
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes)
    store(total_o + d, fma(load(total_o + d), broadcast(before), mul(load(o + d), broadcast(factor))));
  if (const int rest = head_dim - d; rest > 0)
    store_first(total_o + d, rest, fma(load_first(total_o + d, rest), broadcast(before), mul(load_first(o + d, rest), broadcast(factor))));
}

SETPOINT_INLINE void write_result(const Total& total, const float* o, int head_dim, float* out) {
  const Lanes l = broadcast(total.l == 0.f ? 1.f : total.l);  // no token seen: 0 / 1
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, div(load(o + d), l));
  if (d < head_dim) store_first(out + d, head_dim - d, div(load_first(o + d, head_dim - d), l));
}

SETPOINT_INLINE void clear(float* o, int n) {
  int d = 0;
  for (; d + kLanes <= n; d += kLanes) store(o + d, broadcast(0.f));
  if (d < n) store_first(o + d, n - d, broadcast(0.f));
}

// Query j of a call is row j / group, head j % group.
SETPOINT_INLINE size_t head_offset(const AttentionArgs& a, int j) {
  return (static_cast<size_t>(a.kv_head) * a.group + j % a.group) * a.kv.head_dim;
}

SETPOINT_INLINE void fill_tile(const AttentionArgs& a, int first, int count, Tile& tile) {
  tile.count = count;
  for (int r = 0; r < count; ++r) {
    const int row = (first + r) / a.group;
    tile.q[r] = a.q + row * a.q_stride + head_offset(a, first + r);
    tile.visible[r] = TokenRange::visible(a.position + row, a.window);
  }
}

SETPOINT_INLINE void write_partial(const AttentionArgs& a, int j, int split, const Tile& tile, int r) {
  const int head_dim = a.kv.head_dim;
  float* entry = a.partial + j * partial_stride_of(a) + static_cast<size_t>(split - a.split_begin) * (head_dim + 2);
  entry[0] = tile.m[r];
  entry[1] = tile.l[r];
  const float* o = tile.o + r * padded_head_dim(head_dim);
  for (int d = 0; d < head_dim; ++d) entry[2 + d] = o[d];
}

// Scratch: o of the tile's split [kAttentionTileQueries][padded], then totals [queries][padded] and [queries] x (M, L).
template <KvFormat F>
void attention_of(const AttentionArgs& a) {
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim), queries = a.rows * a.group;
  const int tiles = (queries + kAttentionTileQueries - 1) / kAttentionTileQueries, tile_queries = (queries + tiles - 1) / tiles;
  float* total_o = a.scratch + kAttentionTileQueries * padded;
  Total* totals = reinterpret_cast<Total*>(total_o + static_cast<size_t>(queries) * padded);
  Tile tile;
  tile.o = a.scratch;
  if (a.partial == nullptr) {
    clear(total_o, queries * padded);
    for (int j = 0; j < queries; ++j) totals[j] = {kMinusInfinity, 0.f};
  }
  for (int split = a.split_begin; split < a.split_end; ++split)
    for (int first = 0; first < queries; first += tile_queries) {
      fill_tile(a, first, queries - first < tile_queries ? queries - first : tile_queries, tile);
      run_split<F>(a, tile, split);
      for (int r = 0; r < tile.count; ++r) {
        if (a.partial != nullptr)
          write_partial(a, first + r, split, tile, r);
        else
          add_split(totals[first + r], total_o + static_cast<size_t>(first + r) * padded, tile.m[r], tile.l[r], tile.o + r * padded,
                    head_dim);
      }
    }
  if (a.partial != nullptr) return;
  for (int j = 0; j < queries; ++j)
    write_result(totals[j], total_o + static_cast<size_t>(j) * padded, head_dim, a.out + j / a.group * a.out_stride + head_offset(a, j));
}

void attention(const AttentionArgs& a) {
  if (a.kv.head_dim % 8 != 0) return ref_attention(a);  // no model has such heads; vectors of V would need more masks
  switch (a.kv.format) {
    case KvFormat::f32:
      return attention_of<KvFormat::f32>(a);
    case KvFormat::f16:
      return attention_of<KvFormat::f16>(a);
    case KvFormat::bf16:
      return attention_of<KvFormat::bf16>(a);
  }
}

void attention_merge(const float* partial, int rows, int group, int splits, int head_dim, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row)
    for (int g = 0; g < group; ++g) {
      float* result = out + row * out_stride + static_cast<size_t>(g) * head_dim;
      Total total{kMinusInfinity, 0.f};
      clear(result, head_dim);
      for (int s = 0; s < splits; ++s, partial += head_dim + 2) add_split(total, result, partial[0], partial[1], partial + 2, head_dim);
      write_result(total, result, head_dim, result);
    }
}

}  // namespace
}  // namespace setpoint
