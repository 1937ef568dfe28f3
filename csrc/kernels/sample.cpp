// The sampler. Nothing here sorts the vocabulary: bounds come from tile maxima, sets from a radix selection over the
// ordered bits of the logits, and the draw walks the survivors in id order.
#include "kernels/sample.h"

#include "core/cpu_features.h"
#include "kernels/philox.h"
#include "kernels/sample_scan.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace setpoint {
namespace {

static_assert(kTile == kSampleTile);

const SampleScans kScansBaseline = {scan_maxima<4>, scan_weights<4>, scan_mask<4>};

const SampleScans& scans_for(const std::string& isa) {
  const CpuFeatures& cpu = cpu_features();
  if (isa == "ref") return kScansBaseline;
#if defined(__x86_64__)
  if ((isa == "avx512_vnni" || isa == "auto") && cpu.avx512_vnni) return kSampleScansAvx512;
  if ((isa == "avx2" || isa == "auto") && cpu.avx2) return kSampleScansAvx2;
#endif
  if (isa == "auto") return kScansBaseline;
  throw std::runtime_error("the sampler has no isa '" + isa + "' on this CPU; use auto");
}

int tiles_of(int n) { return (n + kTile - 1) / kTile; }

// Ascending with the float; -0 and +0 are one value.
uint32_t order_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Natural logarithm by the atanh series: no libm, whose variants differ from CPU to CPU. x is normal and positive.
double natural_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  const double t = (m - 1) / (m + 1), square = t * t;
  double series = 0;
  for (int k = 21; k >= 1; k -= 2) series = series * square + 1.0 / k;
  return exponent * 0.69314718055994531 + 2 * t * series;
}

float maximum_of(const float* x, int n) {
  float best = -kInfinity;
  for (int i = 0; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// ------------------------------------------------------------------------------------------------------ processors

bool has_processors(const SampleArgs& a) {
  const bool penalties = a.repetition != 1.f || a.frequency != 0.f || a.presence != 0.f;
  return a.mask != nullptr || a.num_allowed >= 0 || a.num_banned > 0 || a.num_bias > 0 || (a.num_penalties > 0 && penalties);
}

// A tiny repetition penalty overflows; the token then is as likely as can be, which is no fault of the row.
float saturate(float x) { return x > FLT_MAX ? FLT_MAX : x; }

void process(const SampleArgs& a, const SampleScans& scans, float* kept) {
  float* logits = a.logits;
  if (a.mask != nullptr) scans.mask(logits, a.vocab, a.mask);
  const auto valid = [&](int32_t id) { return id >= 0 && id < a.vocab; };
  if (a.num_allowed >= 0) {
    std::fill_n(kept, a.vocab, -kInfinity);
    for (int i = 0; i < a.num_allowed; ++i)
      if (valid(a.allowed[i])) kept[a.allowed[i]] = logits[a.allowed[i]];
    std::copy_n(kept, a.vocab, logits);
  }
  for (int i = 0; i < a.num_banned; ++i)
    if (valid(a.banned[i])) logits[a.banned[i]] = -kInfinity;
  for (int i = 0; i < a.num_bias; ++i)
    if (valid(a.bias_ids[i])) logits[a.bias_ids[i]] = saturate(logits[a.bias_ids[i]] + a.bias_values[i]);
  for (int i = 0; i < a.num_penalties; ++i) {
    if (!valid(a.penalty_ids[i])) continue;
    float& x = logits[a.penalty_ids[i]];
    x = saturate(x > 0.f ? x / a.repetition : x * a.repetition);
    if (a.penalty_counts[i] > 0) {
      x -= static_cast<float>(a.penalty_counts[i]) * a.frequency;
      x = saturate(x - a.presence);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- candidates
// A candidate set is (ids ascending, values, weights) in the scratch.

// At least the `count` most likely tokens: all at or above the count-th largest tile maximum.
int gather_top(const float* x, int vocab, int count, SampleScratch& s) {
  const int tiles = tiles_of(vocab);
  float bound = -FLT_MAX;
  if (count <= tiles) {
    std::copy_n(s.tile_max.get(), tiles, s.tile_order.get());
    std::nth_element(s.tile_order.get(), s.tile_order.get() + (count - 1), s.tile_order.get() + tiles, std::greater<>());
    bound = std::max(bound, s.tile_order[count - 1]);
  }
  int n = 0;
  for (int t = 0; t < tiles; ++t) {
    if (s.tile_max[t] < bound) continue;
    const int end = std::min(vocab, (t + 1) * kTile);
    for (int i = t * kTile; i < end; ++i) {
      s.ids[n] = i;
      s.values[n] = x[i];
      n += x[i] >= bound;
    }
  }
  return n;
}

// Keep keys above `key`, and the first `ties` candidates equal to it.
struct Cut {
  uint32_t key;
  double ties;
};

// The smallest set of most likely candidates whose amounts reach `target` (amounts null: 1 each). A radix selection:
// histogram the leading bits, find the bin in which the running total crosses the target, go on inside that bin.
Cut smallest_set(const float* amounts, int n, double target, SampleScratch& s) {
  uint32_t key = 0;
  double above = 0;
  std::iota(s.picks.get(), s.picks.get() + n, 0);
  for (const auto& [shift, width] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
    const uint32_t last = (1u << width) - 1;
    const auto bin_of = [&](int pick) { return order_key(s.values[pick]) >> shift & last; };
    std::fill_n(s.bins.get(), last + 1, 0.0);
    for (int i = 0; i < n; ++i) s.bins[bin_of(s.picks[i])] += amounts ? amounts[s.picks[i]] : 1.0;
    // When rounding leaves the target out of reach, the lowest bin in use holds the cut.
    uint32_t chosen = last;
    double reached = above;
    for (uint32_t bin = last + 1; bin-- > 0;) {
      if (s.bins[bin] == 0.0) continue;
      chosen = bin;
      above = reached;
      reached += s.bins[bin];
      if (reached >= target) break;
    }
    key |= chosen << shift;
    int matched = 0;
    for (int i = 0; i < n; ++i) {
      const int pick = s.picks[i];
      s.picks[matched] = pick;
      matched += bin_of(pick) == chosen;
    }
    n = matched;
  }
  const double tie_amount = amounts ? amounts[s.picks[0]] : 1.0;
  return {key, std::max(1.0, std::ceil((target - above) / tie_amount))};
}

int keep(const Cut& cut, int n, SampleScratch& s) {
  int kept = 0;
  double ties = cut.ties;
  for (int i = 0; i < n; ++i) {
    const uint32_t key = order_key(s.values[i]);
    s.ids[kept] = s.ids[i];
    s.values[kept] = s.values[i];
    const bool tied = key == cut.key;
    kept += (key > cut.key) | (tied & (ties > 0));  // no branch: it would be a random one
    ties -= tied;
  }
  return kept;
}

// ------------------------------------------------------------------------------------------------------------ draw

int32_t first_maximum(const float* x, int vocab, float max, const SampleScratch& s) {
  int t = 0;
  while (s.tile_max[t] != max) ++t;
  int i = t * kTile;
  while (i + 1 < vocab && x[i] != max) ++i;
  return i;
}

// The index in which the running total passes `rest`; `rest` becomes what is left at its begin.
// Where rounding eats the end of the range, the last index with a weight.
int walk(const float* weights, int n, double& rest) {
  int last = 0;
  for (int i = 0; i < n; ++i) {
    if (!(weights[i] > 0)) continue;
    last = i;
    if (rest < weights[i]) return i;
    rest -= weights[i];
  }
  rest = weights[last];
  return last;
}

// Softmax over a row of logits, as weights relative to the most likely token (whose weight is exactly 1).
struct Softmax {
  float max, inverse_temperature, floor;

  double total(const float* x, int n, SampleScratch& s) const {
    s.scans->weights(x, n, max, inverse_temperature, floor, s.weights.get(), s.tile_sum.get());
    double sum = 0;
    for (int t = 0; t < tiles_of(n); ++t) sum += s.tile_sum[t];
    return sum;
  }

  // Inverse of the cumulative distribution in index order: first the tile, then the index in it.
  int draw(const float* x, int n, double uniform, SampleScratch& s) const {
    double rest = uniform * total(x, n, s);
    const int first = walk(s.tile_sum.get(), tiles_of(n), rest) * kTile;
    return first + walk(s.weights.get() + first, std::min(kTile, n - first), rest);
  }
};

// All tokens that the set of mass top_p can need: those below `least` hold less than 1 - top_p together.
int gather_mass(const float* x, int vocab, double top_p, double total, SampleScratch& s) {
  const float least = std::max(FLT_MIN, static_cast<float>(0.5 * (1.0 - top_p) * total / vocab));  // 0.5: rounding
  int n = 0;
  for (int t = 0; t < tiles_of(vocab); ++t) {
    if (s.tile_sum[t] < least) continue;
    const int end = std::min(vocab, (t + 1) * kTile);
    for (int i = t * kTile; i < end; ++i) {
      const float weight = s.weights[i];
      s.ids[n] = i;
      s.values[n] = x[i];
      s.weights[n] = weight;
      n += weight >= least;
    }
  }
  return n;
}

int32_t draw(const SampleArgs& a, float max, SampleScratch& s) {
  const Softmax softmax{max, std::min(1.f / a.temperature, FLT_MAX), std::min(1.f, a.min_p)};  // in this order a NaN is 1
  const double uniform = random_uniform(a.seed, a.position);
  const double top_p = std::max(a.top_p, 0.f);
  const bool by_rank = a.top_k > 0 && a.top_k < a.vocab, by_mass = a.top_p < 1.f;
  if (!by_rank && !by_mass) return softmax.draw(a.logits, a.vocab, uniform, s);
  int n = 0;
  double total = 0;
  if (by_rank) {
    n = gather_top(a.logits, a.vocab, a.top_k, s);
    n = keep(smallest_set(nullptr, n, a.top_k, s), n, s);
    if (by_mass) total = softmax.total(s.values.get(), n, s);
  } else {
    total = softmax.total(a.logits, a.vocab, s);
    n = gather_mass(a.logits, a.vocab, top_p, total, s);
  }
  if (by_mass) n = keep(smallest_set(s.weights.get(), n, top_p * total, s), n, s);
  return s.ids[softmax.draw(s.values.get(), n, uniform, s)];
}

// -------------------------------------------------------------------------------------------------------- logprobs

struct LogSoftmax {
  double max, log_sum;
  float operator()(float x) const { return static_cast<float>((static_cast<double>(x) - max) - log_sum); }
};

// Reads tile_max of the raw logits, so it runs before they are processed. Overwrites the candidate set.
LogSoftmax report_top(const SampleArgs& a, float max, SampleScratch& s, SampleResult& result) {
  const LogSoftmax logprob{max, natural_log(Softmax{max, 1.f, 0.f}.total(a.logits, a.vocab, s))};
  const int wanted = std::min({a.num_logprobs, kMaxLogprobs, a.vocab});
  if (wanted <= 0) return logprob;
  int n = gather_top(a.logits, a.vocab, wanted, s);
  if (n > wanted) n = keep(smallest_set(nullptr, n, wanted, s), n, s);
  for (int i = 0; i < n; ++i) {  // insertion sort; equal values stay in id order
    int at = i;
    for (; at > 0 && s.values[at - 1] < s.values[at]; --at) {
      std::swap(s.values[at - 1], s.values[at]);
      std::swap(s.ids[at - 1], s.ids[at]);
    }
  }
  for (int i = 0; i < n; ++i) {
    result.top_ids[i] = s.ids[i];
    result.top_logprobs[i] = logprob(s.values[i]);
  }
  result.num_top = n;
  return logprob;
}

int32_t rank_of(const float* x, int vocab, int32_t id) {
  const float value = x[id];
  int32_t rank = 1;
  for (int i = 0; i < id; ++i) rank += x[i] >= value;
  for (int i = id + 1; i < vocab; ++i) rank += x[i] > value;
  return rank;
}

}  // namespace

SampleScratch::SampleScratch(int vocab, const char* isa)
    : vocab(vocab),
      scans(&scans_for(isa)),
      raw(new float[vocab]),
      values(new float[vocab]),
      weights(new float[vocab]),
      ids(new int32_t[vocab]),
      picks(new int32_t[vocab]),
      tile_max(new float[tiles_of(vocab)]),
      tile_order(new float[tiles_of(vocab)]),
      tile_sum(new float[tiles_of(vocab)]),
      bins(new double[kBins]) {}

void sample_row(const SampleArgs& a, SampleScratch& s, SampleResult& result) {
  if (a.vocab > s.vocab) throw std::length_error("sample_row: the scratch was made for a smaller vocabulary");
  result.token = -1;
  result.num_top = 0;
  result.finite = false;
  const int tiles = tiles_of(a.vocab);
  if (a.vocab <= 0 || a.target >= a.vocab || s.scans->maxima(a.logits, a.vocab, s.tile_max.get())) return;
  float max = maximum_of(s.tile_max.get(), tiles);
  if (max == -kInfinity) return;

  const bool scored = a.num_logprobs >= 0 || a.target >= 0;
  LogSoftmax logprob{};
  if (scored) logprob = report_top(a, max, s, result);

  const float* raw = a.logits;
  int32_t token = a.target;
  if (a.target < 0) {
    if (has_processors(a)) {
      if (scored) raw = std::copy_n(a.logits, a.vocab, s.raw.get()) - a.vocab;
      process(a, *s.scans, s.values.get());
      if (s.scans->maxima(a.logits, a.vocab, s.tile_max.get())) return;
      max = maximum_of(s.tile_max.get(), tiles);
      if (max == -kInfinity) return;
    }
    token = a.temperature > 0.f ? draw(a, max, s) : first_maximum(a.logits, a.vocab, max, s);
  }
  if (scored) {
    result.logprob = logprob(raw[token]);
    result.rank = rank_of(raw, a.vocab, token);
  }
  result.token = token;
  result.finite = true;
}

}  // namespace setpoint
