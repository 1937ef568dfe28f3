// A tile of queries and a block of tokens: what the walk of attention_walk.h hands to the arithmetic of attention_lanes.h
// (float formats) and attention_code_lanes.h (integers).
#pragma once
#include <type_traits>

namespace setpoint {
namespace {

constexpr int kMostPages = kBlockTokens / kPageTokens;
static_assert(kAttentionTileQueries <= kLanes);  // one vector holds a float for each query of a tile

struct Tile {
  int kv_head, count;                         // queries
  const float* q[kAttentionTileQueries];      // [head_dim] each
  TokenRange visible[kAttentionTileQueries];  // begin and end never fall from one query to the next
  float *m, *l;                               // [kLanes]; what lies behind `count` must keep its value
  float* o;                                   // [count][padded head_dim]
  float* p;                                   // [count][kBlockTokens]: scores, then probabilities of the running block
  float c[kAttentionTileQueries];             // factors of o
  // Of the integer format only; p then becomes weight codes.
  const int16_t* q_codes;                    // [count][padded head_dim]
  float score_scale[kAttentionTileQueries];  // of log2 units
  float weight_scale[kAttentionTileQueries];
  int32_t* sums;  // [count][padded head_dim]
};

struct Block {       // one 64-token block
  int start;         // first token
  TokenRange range;  // tokens some query of the tile sees, inside the block
  int first_page, last_page;
  const int32_t* ids;         // of its pages
  int32_t ahead[kMostPages];  // of the pages to prefetch meanwhile
};

constexpr int at_most(int limit, int wanted) { return wanted <= limit ? wanted : at_most(limit, wanted / 2); }

// Calls f with `count` as a constant.
template <class Function>
SETPOINT_INLINE void with_rows(int count, Function&& f) {
  static_assert(kAttentionTileQueries == 6);
  switch (count) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, 6>());
  }
}

// Limits of query r's visible lanes in the vector of tokens that starts at `token`.
SETPOINT_INLINE TokenRange visible_lanes(const Tile& tile, int r, int token) {
  const TokenRange seen = tile.visible[r].within(token, token + kLanes);
  return seen.empty() ? TokenRange{0, 0} : TokenRange{seen.begin - token, seen.end - token};
}

}  // namespace
}  // namespace setpoint
