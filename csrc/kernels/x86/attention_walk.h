// The walk of a paged attention call over Lanes: split, 64-token block, tiles of queries.
//
// Queries are numbered (kv head of the call, row, head of its group). Tiles of up to kAttentionTileQueries queries of one kv
// head share each load of K and V. A single row visits a block with all its heads together, page by page, so that K and then
// V are read in the order of memory, and fetches the block after it into L2 meanwhile: arithmetic leaves the hardware too few
// loads in flight to do it. Several rows are bound by arithmetic and visit a block tile by tile.
#pragma once

namespace setpoint {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// For tokens of the pages [begin, end) of the block.
template <KvFormat F>
void score(const AttentionArgs& a, const Tile& tile, const Block& block, int begin, int end) {
  with_rows(tile.count, [&](auto rows) {
    if constexpr (F == KvFormat::s16)
      score_codes<rows()>(a, tile, block, begin, end);
    else
      score_floats<F, rows()>(a, tile, block, begin, end);
  });
}

template <KvFormat F>
void soften(const AttentionArgs& a, Tile& tile, const Block& block) {
  if constexpr (F == KvFormat::s16)
    soften_codes(a, tile, block);
  else
    soften_floats(a, tile, block);
}

template <KvFormat F>
void weigh(const AttentionArgs& a, const Tile& tile, const Block& block, int begin, int end) {
  with_rows(tile.count, [&](auto rows) {
    if constexpr (F == KvFormat::s16)
      weigh_codes<rows()>(a, tile, block, begin, end);
    else
      weigh_floats<F, rows()>(a, tile, block, begin, end);
  });
}

// The running total of one query: M, L and O[head_dim] of the splits so far.
struct Total {
  float m, l;
};

// Of all queries of a call, in its scratch.
struct State {
  Tile* tiles;
  Total* totals;       // [queries]
  float *o, *total_o;  // [queries][padded head_dim], of the running split and of those before it
  float* p;            // [queries][kBlockTokens]
  float *m, *l;        // [queries + kLane16]
  int16_t* q_codes;    // [queries][padded head_dim]
  int32_t* sums;       // [queries][padded head_dim]
};
static_assert(sizeof(Tile) <= kAttentionTileFloats * sizeof(float) && alignof(Tile) <= 8);

SETPOINT_INLINE State state_of(const AttentionArgs& a, int queries) {
  const size_t o_floats = static_cast<size_t>(queries) * padded_head_dim(a.kv.head_dim);
  State state;
  state.tiles = reinterpret_cast<Tile*>(a.scratch);
  state.totals = reinterpret_cast<Total*>(a.scratch + static_cast<size_t>(queries) * kAttentionTileFloats);
  state.o = reinterpret_cast<float*>(state.totals + queries);
  state.total_o = state.o + o_floats;
  state.p = state.total_o + o_floats;
  state.m = state.p + static_cast<size_t>(queries) * kBlockTokens;
  state.l = state.m + queries + kLane16;
  state.sums = reinterpret_cast<int32_t*>(state.l + queries + kLane16);
  state.q_codes = reinterpret_cast<int16_t*>(state.sums + o_floats);
  return state;
}

SETPOINT_INLINE void clear(float* o, int n) {
  int d = 0;
  for (; d + kLanes <= n; d += kLanes) store(o + d, broadcast(0.f));
  if (d < n) store_first(o + d, n - d, broadcast(0.f));
}

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

// Where query j is in the rows of q and out, and its number among the row's heads of the call.
struct Place {
  int row, head;
};
SETPOINT_INLINE Place place_of(const AttentionArgs& a, int j) {
  const int of_head = a.rows * a.group;
  return {j % of_head / a.group, j / of_head * a.group + j % a.group};
}
SETPOINT_INLINE size_t head_offset(const AttentionArgs& a, int head) {
  return (static_cast<size_t>(a.kv_head_begin) * a.group + head) * a.kv.head_dim;
}

// Returns the number of tiles.
template <KvFormat F>
int make_tiles(const AttentionArgs& a, const State& state) {
  const int of_head = a.rows * a.group, tiles = (of_head + kAttentionTileQueries - 1) / kAttentionTileQueries;
  const int tile_queries = (of_head + tiles - 1) / tiles;
  Tile* tile = state.tiles;
  for (int kv_head = a.kv_head_begin; kv_head < a.kv_head_end; ++kv_head)
    for (int first = 0; first < of_head; first += tile_queries, ++tile) {
      const int j = (kv_head - a.kv_head_begin) * of_head + first;
      tile->kv_head = kv_head;
      tile->count = of_head - first < tile_queries ? of_head - first : tile_queries;
      for (int r = 0; r < tile->count; ++r) {
        const Place place = place_of(a, j + r);
        tile->q[r] = a.q + place.row * a.q_stride + head_offset(a, place.head);
        tile->visible[r] = TokenRange::visible(a.position + place.row, a.window);
        if constexpr (F == KvFormat::s16) {
          int16_t* codes = state.q_codes + static_cast<size_t>(j + r) * padded_head_dim(a.kv.head_dim);
          tile->score_scale[r] = score_scale(quantize_row(tile->q[r], a.kv.head_dim, codes).scale, a.scale);
        }
      }
      tile->sums = state.sums + static_cast<size_t>(j) * padded_head_dim(a.kv.head_dim);
      tile->q_codes = state.q_codes + static_cast<size_t>(j) * padded_head_dim(a.kv.head_dim);
      tile->m = state.m + j;
      tile->l = state.l + j;
      tile->o = state.o + static_cast<size_t>(j) * padded_head_dim(a.kv.head_dim);
      tile->p = state.p + (a.rows == 1 ? static_cast<size_t>(j) * kBlockTokens : 0);
    }
  return static_cast<int>(tile - state.tiles);
}

// A block, for tiles that see the same tokens.
template <KvFormat F>
void visit(const AttentionArgs& a, Tile* tiles, int count, int start) {
  const TokenRange seen{tiles[0].visible[0].begin, tiles[0].visible[tiles[0].count - 1].end};
  Block block;
  block.start = start;
  block.range = seen.within(start, start + kBlockTokens);
  if (block.range.empty()) return;
  block.first_page = (block.range.begin - start) / kPageTokens;
  block.last_page = (block.range.end - start + kPageTokens - 1) / kPageTokens;
  block.ids = a.block_table + start / kPageTokens;
  const int left = (seen.end - start - kBlockTokens + kPageTokens - 1) / kPageTokens;  // pages, after this block
  for (int page = block.first_page; page < block.last_page; ++page)
    block.ahead[page] = page < left                            ? block.ids[kMostPages + page]
                        : left <= 0 && page < a.num_next_pages ? a.next_pages[page]
                                                               : block.ids[page];
  const int step = count > 1 ? 1 : kMostPages;
  const auto by = [&](auto&& visit_pages) {
    for (int page = block.first_page; page < block.last_page;) {
      const int end = page + step < block.last_page ? page + step : block.last_page;
      for (int t = 0; t < count; ++t) visit_pages(tiles[t], page, end);
      page = end;
    }
  };
  by([&](const Tile& tile, int begin, int end) { score<F>(a, tile, block, begin, end); });
  for (int t = 0; t < count; ++t) soften<F>(a, tiles[t], block);
  by([&](const Tile& tile, int begin, int end) { weigh<F>(a, tile, block, begin, end); });
}

template <KvFormat F>
void finish_split(const AttentionArgs& a, const State& state, int queries, int split) {
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim);
  for (int i = 0; i < queries * padded; i += kLanes) store(state.o + i, add(load(state.o + i), broadcast(0.f)));
  for (int j = 0; j < queries; ++j) {
    if constexpr (F == KvFormat::s16) state.m[j] = state.m[j] * kLn2;
    const float* o = state.o + static_cast<size_t>(j) * padded;
    if (a.partial == nullptr) {
      add_split(state.totals[j], state.total_o + static_cast<size_t>(j) * padded, state.m[j], state.l[j], o, head_dim);
      continue;
    }
    const Place place = place_of(a, j);
    float* entry = partial_entry(a, place.row, place.head, split);
    entry[0] = state.m[j];
    entry[1] = state.l[j];
    for (int d = 0; d < head_dim; ++d) entry[2 + d] = o[d];
  }
}

template <KvFormat F>
void attention_of(const AttentionArgs& a) {
  const int head_dim = a.kv.head_dim, padded = padded_head_dim(head_dim), queries = a.rows * heads_of(a);
  const State state = state_of(a, queries);
  const int tiles = make_tiles<F>(a, state), together = a.rows == 1 ? tiles : 1;
  const TokenRange seen{TokenRange::visible(a.position, a.window).begin, a.position + a.rows};
  clear(state.total_o, queries * padded);
  for (int j = 0; j < queries; ++j) state.totals[j] = {kMinusInfinity, 0.f};
  for (int split = a.split_begin; split < a.split_end; ++split) {
    for (int j = 0; j < queries; ++j) state.m[j] = kMinusInfinity, state.l[j] = 0.f;
    clear(state.o, queries * padded);
    const TokenRange tokens = seen.within(split * kSplitTokens, (split + 1) * kSplitTokens);
    for (int start = tokens.begin - tokens.begin % kBlockTokens; start < tokens.end; start += kBlockTokens)
      for (int tile = 0; tile < tiles; tile += together) visit<F>(a, state.tiles + tile, together, start);
    finish_split<F>(a, state, queries, split);
  }
  if (a.partial != nullptr) return;
  for (int j = 0; j < queries; ++j) {
    const Place place = place_of(a, j);
    write_result(state.totals[j], state.total_o + static_cast<size_t>(j) * padded, head_dim,
                 a.out + place.row * a.out_stride + head_offset(a, place.head));
  }
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
    case KvFormat::s16:
      return attention_of<KvFormat::s16>(a);
  }
}

void attention_merge(const float* partial, int rows, int heads, int splits, int head_dim, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row)
    for (int h = 0; h < heads; ++h) {
      float* result = out + row * out_stride + static_cast<size_t>(h) * head_dim;
      Total total{kMinusInfinity, 0.f};
      clear(result, head_dim);
      for (int s = 0; s < splits; ++s, partial += head_dim + 2) add_split(total, result, partial[0], partial[1], partial + 2, head_dim);
      write_result(total, result, head_dim, result);
    }
}

}  // namespace
}  // namespace setpoint
