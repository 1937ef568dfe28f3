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
constexpr float kMinusInfinity = -__builtin_inff();

struct Tile {
  int count;                         // queries, consecutive (row, head) pairs
  const float* q[kAttentionTileQueries];      // [head_dim] each
  TokenRange visible[kAttentionTileQueries];  // begin and end never fall from one query to the next
  float m[kAttentionTileQueries], l[kAttentionTileQueries];
  float* o;                          // [count][padded head_dim]
};

struct Block {  // the pages of one 64-token block that a tile needs
  int start;         // first token of the block
  TokenRange range;  // tokens some query of the tile sees, inside the block
  int first_page, last_page;
  const uint8_t* k[kMostPages];
  const uint8_t* v[kMostPages];
};

constexpr int at_most(int limit, int wanted) { return wanted <= limit ? wanted : at_most(limit, wanted / 2); }

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
    if (kPages >= 4 && left >= 4) score_pages<F, R, at_most(kPages, 4)>(tile, block, page, head_dim, scores), page += 4;
    else if (kPages >= 2 && left >= 2) score_pages<F, R, at_most(kPages, 2)>(tile, block, page, head_dim, scores), page += 2;
    else score_pages<F, R, 1>(tile, block, page, head_dim, scores), page += 1;
  }
}

// Turns the scores of one query into probabilities in place, 0 where masked; updates m and l; returns the factor of o.
SETPOINT_INLINE float softmax_block(Tile& tile, int r, const Block& block, float scale, float* p) {
  const TokenRange seen = tile.visible[r].within(block.start, block.start + kBlockTokens);
  if (seen.empty()) {
    for (int i = 0; i < kBlockTokens; i += kLanes) store(p + i, broadcast(0.f));
    return 1.f;
  }
  const int begin = seen.begin - block.start, end = seen.end - block.start;
  Lanes top[kParts], sum[kParts], score[kBlockTokens / kLanes];
  for (int j = 0; j < kParts; ++j) top[j] = broadcast(tile.m[r]), sum[j] = broadcast(0.f);
  for (int i = 0; i < kBlockTokens / kLanes; ++i) {
    const int low = begin - i * kLanes, high = end - i * kLanes;  // visible lanes of this vector
    score[i] = mul(load(p + i * kLanes), broadcast(scale));
    if (low > 0 || high < kLanes)
      score[i] = select_range(low < 0 ? 0 : low > kLanes ? kLanes : low, high < 0 ? 0 : high > kLanes ? kLanes : high, score[i], broadcast(kMinusInfinity));
    top[i % kParts] = max(score[i], top[i % kParts]);
  }
  const float m = tree16_max(top) + 0.f;
  for (int i = 0; i < kBlockTokens / kLanes; ++i) {
    const Lanes value = exp_lanes(sub(score[i], broadcast(m)));
    sum[i % kParts] = add(sum[i % kParts], value);
    store(p + i * kLanes, value);
  }
  const float c = exp_scalar(tile.m[r] - m);
  tile.m[r] = m;
  tile.l[r] = __builtin_fmaf(tile.l[r], c, tree16_sum(sum));
  return c;
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
  float c[R];
  score_block<F, R>(tile, block, a.kv.head_dim, p);
  for (int r = 0; r < R; ++r) c[r] = softmax_block(tile, r, block, a.scale, p + r * kBlockTokens);
  weigh_block<F, R>(tile, block, a.kv.head_dim, c, p);
}

template <KvFormat F>
void add_block(const AttentionArgs& a, Tile& tile, const Block& block) {
  static_assert(kAttentionTileQueries == 6);
  switch (tile.count) {
    case 1: return add_block<F, 1>(a, tile, block);
    case 2: return add_block<F, 2>(a, tile, block);
    case 3: return add_block<F, 3>(a, tile, block);
    case 4: return add_block<F, 4>(a, tile, block);
    case 5: return add_block<F, 5>(a, tile, block);
    default: return add_block<F, 6>(a, tile, block);
  }
}

// Pages without a visible token keep the pointers of the block before: nothing reads them.
SETPOINT_INLINE void find_pages(const AttentionArgs& a, Block& block) {
  block.first_page = (block.range.begin - block.start) / kPageTokens;
  block.last_page = (block.range.end - block.start + kPageTokens - 1) / kPageTokens;
  for (int page = block.first_page; page < block.last_page; ++page) {
    const size_t element = page_element(a.kv, a.block_table, a.kv_head, block.start + page * kPageTokens);
    block.k[page] = a.kv.k + element * kv_element_bytes(a.kv.format);
    block.v[page] = a.kv.v + element * kv_element_bytes(a.kv.format);
  }
}

template <KvFormat F>
void run_split(const AttentionArgs& a, Tile& tile, int split) {
  const int padded = padded_head_dim(a.kv.head_dim);
  for (int r = 0; r < tile.count; ++r) tile.m[r] = kMinusInfinity, tile.l[r] = 0.f;
  for (int i = 0; i < tile.count * padded; i += kLanes) store(tile.o + i, broadcast(0.f));
  const TokenRange seen{tile.visible[0].begin, tile.visible[tile.count - 1].end};
  Block block;
  for (block.start = split * kSplitTokens; block.start < (split + 1) * kSplitTokens; block.start += kBlockTokens) {
    block.range = seen.within(block.start, block.start + kBlockTokens);
    if (block.range.empty()) continue;
    find_pages(a, block);
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
        if (a.partial != nullptr) write_partial(a, first + r, split, tile, r);
        else add_split(totals[first + r], total_o + static_cast<size_t>(first + r) * padded, tile.m[r], tile.l[r], tile.o + r * padded, head_dim);
      }
    }
  if (a.partial != nullptr) return;
  for (int j = 0; j < queries; ++j)
    write_result(totals[j], total_o + static_cast<size_t>(j) * padded, head_dim, a.out + j / a.group * a.out_stride + head_offset(a, j));
}

void attention(const AttentionArgs& a) {
  if (a.kv.head_dim % 8 != 0) return ref_attention(a);  // no model has such heads; vectors of V would need more masks
  switch (a.kv.format) {
    case KvFormat::f32: return attention_of<KvFormat::f32>(a);
    case KvFormat::f16: return attention_of<KvFormat::f16>(a);
    case KvFormat::bf16: return attention_of<KvFormat::bf16>(a);
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

// K is converted a row at a time, then spread over its page: one token is one column of [head_dim][16].
template <KvFormat F>
void store_row(const float* k, const float* v, int head_dim, int slot, uint8_t* k_page, uint8_t* v_page) {
  using Element = std::conditional_t<F == KvFormat::f32, uint32_t, uint16_t>;
  for (int d = 0; d < head_dim; d += kLanes) {
    const int n = head_dim - d < kLanes ? head_dim - d : kLanes;
    store_kv_first<F>(v_page, static_cast<size_t>(slot) * head_dim + d, n, load_first(v + d, n));
    alignas(64) Element column[kLanes];
    store_kv_first<F>(reinterpret_cast<uint8_t*>(column), 0, n, load_first(k + d, n));
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
      const size_t page = page_element(a.kv, a.block_table, head, a.position + row) * kv_element_bytes(F);
      store_row<F>(a.k + row * a.k_stride + offset, a.v + row * a.v_stride + offset, head_dim, (a.position + row) % kPageTokens,
                   a.kv.k + page, a.kv.v + page);
    }
}

void kv_store(const KvStoreArgs& a) {
  if (a.kv.head_dim % 8 != 0) return ref_kv_store(a);
  switch (a.kv.format) {
    case KvFormat::f32: return kv_store_of<KvFormat::f32>(a);
    case KvFormat::f16: return kv_store_of<KvFormat::f16>(a);
    case KvFormat::bf16: return kv_store_of<KvFormat::bf16>(a);
  }
}

void register_attention(KernelTable& t) {
  t.kv_store = kv_store;
  t.attention = attention;
  t.attention_merge = attention_merge;
}

}  // namespace
}  // namespace setpoint
