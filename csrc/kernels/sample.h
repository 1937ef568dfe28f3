// One row of logits -> one token, with its logprob, rank and the most likely tokens beside it.
//
// Order (setpoint/engine/plan.py, RowSampling): mask, allowed and banned ids, bias, repetition penalty, frequency and
// presence penalty, temperature, min_p, top_k, top_p, draw. Logprobs, rank and top ids come from the raw logits,
// before any of that. Ties always go to the lowest id: greedy, top_k, top_p, rank and top ids rank tokens by
// (logit descending, id ascending), so top_k = 1 is greedy.
//
// Batch invariance: every sum has a fixed order. The vocabulary is cut into tiles of kSampleTile; inside a tile
// 16 lanes (lane l takes elements l, l + 16, ...) are added by a fixed tree, tile totals are added in order in
// double. All ISA variants are the same source with explicit lanes, so they are bit-equal.
#pragma once
#include <cstdint>
#include <memory>

namespace setpoint {

constexpr int kSampleTile = 256;  // vocabulary tile; small enough that top_k <= tiles finds its bound in the tile maxima
constexpr int kMaxLogprobs = 20;

// Ids outside [0, vocab) are ignored, wherever they come from. Penalty ids are expected to be unique.
struct SampleArgs {
  float* logits = nullptr;  // [vocab]; mutable scratch, contents undefined afterwards
  int vocab = 0;
  float temperature = 1.f;  // <= 0 is greedy
  int top_k = 0;            // 0 or less = off
  float top_p = 1.f;        // smallest set whose mass reaches top_p, at least one token
  float min_p = 0.f;        // keeps tokens with p >= min_p * p_max
  uint64_t seed = 0;
  int64_t position = 0;  // the draw depends on (seed, position) and the distribution alone
  float repetition = 1.f, frequency = 0.f, presence = 0.f;
  const int32_t* penalty_ids = nullptr;     // repetition applies to all,
  const int32_t* penalty_counts = nullptr;  // frequency and presence where count > 0
  int num_penalties = 0;
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  int num_bias = 0;
  const int32_t* banned = nullptr;
  int num_banned = 0;
  const int32_t* allowed = nullptr;
  int num_allowed = -1;            // -1 = all
  const uint32_t* mask = nullptr;  // [ceil(vocab / 32)] bit i % 32 of word i / 32: token i is allowed; null = all
  int target = -1;                 // >= 0: score this token, draw nothing
  int num_logprobs = -1;           // -1 = no logprobs; 0..kMaxLogprobs top ids beside the token
};

struct SampleResult {
  int32_t token = -1;
  float logprob = 0.f;  // with rank and top_*: set when num_logprobs >= 0 or target >= 0
  int32_t rank = 0;     // 1 = most likely
  bool finite = true;   // false: NaN or +inf in the row, nothing left to choose, or target outside; token is -1
  int num_top = 0;      // less than num_logprobs when fewer tokens have a probability
  int32_t top_ids[kMaxLogprobs];
  float top_logprobs[kMaxLogprobs];
};

struct SampleScans;  // the vector loops of one ISA: sample_scan.h

// Buffers of one thread: about 20 bytes per vocabulary entry. Allocated here, never in sample_row.
// isa: "auto", "ref", "avx2" or "avx512_vnni"; throws std::runtime_error when the CPU lacks it.
struct SampleScratch {
  explicit SampleScratch(int vocab, const char* isa = "auto");

  static constexpr int kBins = 2048;
  int vocab;
  const SampleScans* scans;
  std::unique_ptr<float[]> raw;         // [vocab] logits before processing, when logprobs want them
  std::unique_ptr<float[]> values;      // [vocab] logits of the candidates
  std::unique_ptr<float[]> weights;     // [vocab] exp((logit - max) / temperature), by id or by candidate
  std::unique_ptr<int32_t[]> ids;       // [vocab] candidates, ascending
  std::unique_ptr<int32_t[]> picks;     // [vocab] candidates that a selection still weighs
  std::unique_ptr<float[]> tile_max;    // [tiles]
  std::unique_ptr<float[]> tile_order;  // [tiles] copy to select from
  std::unique_ptr<float[]> tile_sum;    // [tiles]
  std::unique_ptr<double[]> bins;       // [kBins] histogram of the radix selection
};

// Throws std::length_error when the scratch was made for a smaller vocabulary; allocates nothing.
void sample_row(const SampleArgs&, SampleScratch&, SampleResult&);

}  // namespace setpoint
