#include "program/shortlist.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/packed_layout.h"
#include "program/matmul_stage.h"
#include "quant/half.h"

namespace setpoint {

namespace {

constexpr int kLanes = 16;
constexpr int kMinChannels = 4096;     // below, the whole matrix is read in no time
constexpr int kScreenPanels = 128;     // products of so many panels are bounded while they are in cache
constexpr int kMeasuredPanels = 16;    // the same, while errors are measured
constexpr int kPowerSteps = 16;        // of the iteration that finds a direction
constexpr int kMaxScaleBits = 0x6c00;  // 4096: times 8 still a finite f16
constexpr double kMaxNorm = 1e20;      // of an input: no bound overflows below it
constexpr int kRecordScales = 2 * kLanes;

float bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t nearest_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t bf16_at_least(float x) {  // x >= 0
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0xffff) >> 16);
}

using Floats4 = float __attribute__((vector_size(16)));

Floats4 load4(const float* at) {
  Floats4 x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

Floats4 bf16_4(const uint16_t* at) {
  using Words4 = uint16_t __attribute__((vector_size(8)));
  using Doublewords4 = uint32_t __attribute__((vector_size(16)));
  Words4 words;
  std::memcpy(&words, at, sizeof words);
  return std::bit_cast<Floats4>(__builtin_convertvector(words, Doublewords4) << 16);
}

float largest_of_16(Floats4 a, Floats4 b, Floats4 c, Floats4 d) {
  const Floats4 first = a > b ? a : b, second = c > d ? c : d, top = first > second ? first : second;
  return std::max(std::max(top[0], top[1]), std::max(top[2], top[3]));
}

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// Scales x to norm 1; leaves a zero vector alone.
void normalize(std::vector<float>& x) {
  const double norm = std::sqrt(dot(x.data(), x.data(), static_cast<int>(x.size())));
  if (!(norm > 0) || !std::isfinite(norm)) {
    std::fill(x.begin(), x.end(), 0.f);
    return;
  }
  for (float& value : x) value = static_cast<float>(static_cast<double>(value) / norm);
}

PackedWeight shortened(PackedWeight whole) {
  whole.codes = Codes::u5;
  whole.zero_point = 16;
  return whole;
}

// The code's part that 5 bits hold: code = 8 * kept + rest, rest in [-4, 3], or up to 7 where kept is at its end.
uint8_t kept_bits(uint8_t code) { return static_cast<uint8_t>(code > 251 ? 31 : (code + 4) >> 3); }

}  // namespace

bool Shortlist::suits_shape(const PackedWeight& w) {
  return w.codes == Codes::u8 && w.scale_type == ScaleType::f16 && !w.affine && w.zero_point == 128 && w.group == 32 && w.n >= kMinChannels;
}

bool Shortlist::suits(const PackedWeight& w) {
  if (!suits_shape(w)) return false;
  const size_t record = static_cast<size_t>(record_bytes(w.codes, w.scale_type, w.affine, w.group));
  const size_t records = panel_bytes(w) / record * static_cast<size_t>(w.panels());
  for (size_t i = 0; i < records; ++i)
    for (int lane = 0; lane < kRecordScales; ++lane)
      if ((load_u16(w.data + i * record + static_cast<size_t>(lane) * 2) & 0x7fff) > kMaxScaleBits) return false;
  return true;
}

// In memory: a line that says it is made, the codes, the bounds, the directions.
size_t Shortlist::memory_bytes(const PackedWeight& whole) {
  const size_t panels = static_cast<size_t>(whole.panels());
  return kLineBytes + panel_bytes(shortened(whole)) * panels + panels * kBounds * kLanes * sizeof(uint16_t) +
         kDirections * static_cast<size_t>(whole.k) * sizeof(float);
}

bool Shortlist::is_made(const uint8_t* memory) { return memory[0] == 1; }

Shortlist::Shortlist(const PackedWeight& whole, int max_rows, uint8_t* memory)
    : weight_(shortened(whole)),
      codes_(memory + kLineBytes),
      bounds_(reinterpret_cast<uint16_t*>(codes_ + panel_bytes(weight_) * panels())),
      directions_(reinterpret_cast<float*>(bounds_ + panels() * kBounds * kLanes)),
      panel_norms_(panels()),
      rows_(static_cast<size_t>(max_rows)),
      upper_(static_cast<size_t>(max_rows) * panels()) {
  weight_.data = codes_;
  if (is_made(memory)) measure_panels();
}

Shortlist::Shortlist(const PackedWeight& whole, std::span<const float> hidden, const KernelTable& kernels, ThreadPool& pool, int max_rows,
                     uint8_t* memory)
    : Shortlist(whole, max_rows, memory) {
  coarse_directions_ = QuantizedActivations(kDirections, whole.k);
  fine_directions_ = QuantizedActivations(kDirections, whole.k);
  find_directions(hidden);
  const size_t count = static_cast<size_t>(kDirections) * static_cast<size_t>(whole.k);
  std::vector<float> quantized(directions_, directions_ + count);
  coarse_directions_.quantize(kernels, quantized.data(), static_cast<size_t>(whole.k), 0, kDirections, 0, whole.k);
  for (int d = 0; d < kDirections; ++d) coarse_directions_.subtract_from(quantized.data() + d * whole.k, d);
  fine_directions_.quantize(kernels, quantized.data(), static_cast<size_t>(whole.k), 0, kDirections, 0, whole.k);
  for (int d = 0; d < kDirections; ++d) fine_directions_.subtract_from(quantized.data() + d * whole.k, d);
  for (size_t i = 0; i < count; ++i) directions_[i] -= quantized[i];  // without what both planes leave out
  measure_errors(whole, kernels, pool);
  measure_panels();
  memory[0] = 1;
}

void Shortlist::measure_panels() {
  for (size_t panel = 0; panel < panels(); ++panel) {
    const uint16_t* norms = bounds_ + (panel * kBounds + norm) * kLanes;
    panel_norms_[panel] = bf16(*std::max_element(norms, norms + kLanes));  // positive ones: their bits are in their order
  }
}

// Principal directions of the hidden rows, by power iteration on what the ones before leave.
void Shortlist::find_directions(std::span<const float> hidden) {
  const size_t k = static_cast<size_t>(weight_.k);
  std::vector<float> left(hidden.begin(), hidden.end());
  for (int d = 0; d < kDirections; ++d) {
    std::vector<float> direction(k, 0.f);
    for (size_t row = 0; row + k <= left.size(); row += k)
      for (size_t i = 0; i < k; ++i) direction[i] += left[row + i];
    normalize(direction);
    for (int step = 0; step < kPowerSteps; ++step) {
      std::vector<float> next(k, 0.f);
      for (size_t row = 0; row + k <= left.size(); row += k) {
        const float component = static_cast<float>(dot(&left[row], direction.data(), weight_.k));
        for (size_t i = 0; i < k; ++i) next[i] += component * left[row + i];
      }
      normalize(next);
      direction = std::move(next);
    }
    for (size_t row = 0; row + k <= left.size(); row += k) {
      const float component = static_cast<float>(dot(&left[row], direction.data(), weight_.k));
      for (size_t i = 0; i < k; ++i) left[row + i] -= component * direction[i];
    }
    std::copy(direction.begin(), direction.end(), directions_ + static_cast<ptrdiff_t>(k) * d);
  }
}

// The 5-bit copy of a panel, and per channel the squared norms of the copy and of what it leaves out.
void Shortlist::shorten(const PackedWeight& whole, int panel, float* error_norms, float* kept_norms) {
  const uint8_t* from = whole.data + static_cast<size_t>(panel) * panel_bytes(whole);
  uint8_t* to = codes_ + static_cast<size_t>(panel) * panel_bytes(weight_);
  std::fill_n(error_norms, kLanes, 0.f);
  std::fill_n(kept_norms, kLanes, 0.f);
  float scales[2][kLanes];
  const int steps = whole.k / kStepInputs;
  for (int step = 0; step < steps; ++step) {
    if (step % 2 == 0) {
      for (int i = 0; i < kRecordScales; ++i) {
        scales[i / kLanes][i % kLanes] = load_f16(from + i * 2);
        const uint16_t scale = f32_to_f16(8.f * scales[i / kLanes][i % kLanes]);
        std::memcpy(to + i * 2, &scale, 2);
      }
      from += kLineBytes;
      to += kLineBytes;
    }
    uint16_t error[kLineBytes] = {}, size[kLineBytes] = {};
    uint8_t fifth_bits[kLineBytes] = {};
    for (int pair = 0; pair < 4; ++pair, from += 2 * kLineBytes, to += kLineBytes) {
      for (int i = 0; i < kLineBytes; ++i) {
        const uint8_t low = kept_bits(from[i]), high = kept_bits(from[i + kLineBytes]);
        to[i] = static_cast<uint8_t>((low & 15) | high << 4);
        fifth_bits[i] = static_cast<uint8_t>(fifth_bits[i] | low >> 4 << 2 * pair | high >> 4 << (2 * pair + 1));
        const int16_t first = static_cast<int16_t>(from[i] - 8 * low), second = static_cast<int16_t>(from[i + kLineBytes] - 8 * high);
        error[i] = static_cast<uint16_t>(error[i] + first * first + second * second);
        size[i] = static_cast<uint16_t>(size[i] + (low - 16) * (low - 16) + (high - 16) * (high - 16));
      }
    }
    to = std::copy_n(fifth_bits, kLineBytes, to);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float square = scales[step % 2][lane] * scales[step % 2][lane];
      const uint16_t* e = error + lane * 4;
      const uint16_t* s = size + lane * 4;
      error_norms[lane] += square * static_cast<float>(e[0] + e[1] + e[2] + e[3]);
      kept_norms[lane] += 64.f * square * static_cast<float>(s[0] + s[1] + s[2] + s[3]);
    }
  }
}

// Per channel: the error's components along the directions (the exact product less the short one), and the norm of
// the rest of it.
void Shortlist::measure_errors(const PackedWeight& whole, const KernelTable& kernels, ThreadPool& pool) {
  FloatRows exact(kDirections, whole.n), brief(kDirections, whole.n);
  auto multiply = [&](const PackedWeight& weight, FloatRows& out, int begin, int end) {
    MatmulArgs args;
    args.weight = &weight;
    args.row_end = kDirections;
    args.panel_begin = begin;
    args.panel_end = end;
    args.out = out.values.data();
    args.out_stride = out.stride;
    args.q = coarse_directions_.view();
    run_matmul(kernels, args);
    args.q = fine_directions_.view();
    args.accumulate = true;
    run_matmul(kernels, args);
  };
  pool.run([&](int thread) {
    const int begin = whole.panels() * thread / pool.size(), end = whole.panels() * (thread + 1) / pool.size();
    float error_norms[kMeasuredPanels][kLanes], kept_norms[kMeasuredPanels][kLanes];
    for (int first = begin; first < end; first += kMeasuredPanels) {
      const int last = std::min(first + kMeasuredPanels, end);
      for (int panel = first; panel < last; ++panel) shorten(whole, panel, error_norms[panel - first], kept_norms[panel - first]);
      multiply(whole, exact, first, last);
      multiply(weight_, brief, first, last);
      for (int channel = first * kLanes; channel < std::min(last * kLanes, whole.n); ++channel) {
        float along[kDirections];
        for (int d = 0; d < kDirections; ++d) along[d] = exact.row(d)[channel] - brief.row(d)[channel];
        const int panel = channel / kLanes, lane = channel % kLanes;
        store_bounds(channel, along, error_norms[panel - first][lane], kept_norms[panel - first][lane]);
      }
    }
  });
}

void Shortlist::store_bounds(int channel, const float* along, float error_norm, float kept_norm) {
  uint16_t* bounds = bounds_ + static_cast<size_t>(channel / kLanes) * kBounds * kLanes + channel % kLanes;
  double rest = static_cast<double>(error_norm);
  for (int d = 0; d < kDirections; ++d) {
    const uint16_t stored = nearest_bf16(along[d]);
    bounds[(error_along + d) * kLanes] = stored;
    rest += static_cast<double>(bf16(stored)) * (static_cast<double>(bf16(stored)) - 2. * static_cast<double>(along[d]));
  }
  // The sums are floats, and the directions' norms not quite 1: one part in a thousand of the whole covers both.
  const double padded = std::max(rest, 0.) + 1e-3 * static_cast<double>(error_norm);
  bounds[error_rest * kLanes] = bf16_at_least(static_cast<float>(std::sqrt(padded)));
  bounds[norm * kLanes] = bf16_at_least((std::sqrt(kept_norm) + std::sqrt(error_norm)) * 1.001f);
}

bool Shortlist::load_row(int row, const QuantizedActivations& coarse, const QuantizedActivations& fine) {
  const int k = weight_.k;
  Row& r = rows_[static_cast<size_t>(row)];
  double along[kDirections] = {}, size = 0, fine_size = 0, rest = 0;
  const size_t first = static_cast<size_t>(row) * static_cast<size_t>(k);
  auto input = [&](int i) {
    const size_t at = first + static_cast<size_t>(i);
    return coarse.scales[at / 32] * static_cast<float>(coarse.codes[at]);
  };
  for (int i = 0; i < k; ++i) {
    const double x = static_cast<double>(input(i));
    const size_t at = first + static_cast<size_t>(i);
    const double small = static_cast<double>(fine.scales[at / 32] * static_cast<float>(fine.codes[at]));
    for (int d = 0; d < kDirections; ++d) along[d] += x * static_cast<double>(directions_[static_cast<size_t>(d * k + i)]);
    size += x * x;
    fine_size += small * small;
  }
  for (int i = 0; i < k; ++i) {
    double x = static_cast<double>(input(i));
    for (int d = 0; d < kDirections; ++d) x -= along[d] * static_cast<double>(directions_[static_cast<size_t>(d * k + i)]);
    rest += x * x;
  }
  // A product of k inputs is k / 32 float steps; each may be off by 2^-24 of at most |weights| |x|.
  const double steps = static_cast<double>(k / 32 + 64) * 0x1p-22;
  for (int d = 0; d < kDirections; ++d) {
    r.along[d] = static_cast<float>(along[d]);
    r.rounding[d] = static_cast<float>(std::abs(along[d]) * 0x1p-8);
  }
  r.rest = static_cast<float>(std::sqrt(rest) * (1 + 1e-6));
  r.slack = static_cast<float>(std::sqrt(fine_size) * (1 + 1e-6) + steps * std::sqrt(size));
  return size <= kMaxNorm * kMaxNorm;
}

// The most that an exact logit of the panel can be, from the short products y.
float Shortlist::panel_bound(const Row& row, const float* y, int panel) const {
  const uint16_t* bounds = bounds_ + static_cast<size_t>(panel) * kBounds * kLanes;
  const int channels = std::min(kLanes, weight_.n - panel * kLanes);
  float last[kLanes];
  if (channels < kLanes) {
    std::fill(std::copy_n(y, channels, last), last + kLanes, -std::numeric_limits<float>::infinity());
    y = last;
  }
  Floats4 most[4];
  for (int i = 0; i < 4; ++i) {
    const uint16_t* at = bounds + i * 4;
    most[i] = load4(y + i * 4) + bf16_4(at + error_rest * kLanes) * row.rest + bf16_4(at + norm * kLanes) * row.slack;
    for (int d = 0; d < kDirections; ++d) {
      const Floats4 error = bf16_4(at + (error_along + d) * kLanes);
      most[i] += error * row.along[d] + (error < 0 ? -error : error) * row.rounding[d];
    }
  }
  return largest_of_16(most[0], most[1], most[2], most[3]);
}

template <class BoundOf>
void Shortlist::screen(const KernelTable& kernels, MatmulArgs args, BoundOf&& bound_of) {
  const int end = args.panel_end;
  for (int panel = args.panel_begin; panel < end; panel += kScreenPanels) {
    args.panel_begin = panel;
    args.panel_end = std::min(panel + kScreenPanels, end);
    run_matmul(kernels, args);
    for (int row = args.row_begin; row < args.row_end; ++row) {
      const float* y = args.out + static_cast<size_t>(row) * args.out_stride;
      float* upper = upper_.data() + static_cast<size_t>(row) * panels();
      for (int p = args.panel_begin; p < args.panel_end; ++p) upper[p] = bound_of(rows_[static_cast<size_t>(row)], y + p * kLanes, p);
    }
  }
}

void Shortlist::screen_copy(const KernelTable& kernels, MatmulArgs args) {
  args.weight = &weight_;
  screen(kernels, args, [this](const Row& row, const float* y, int panel) { return panel_bound(row, y, panel); });
}

void Shortlist::screen_whole(const KernelTable& kernels, MatmulArgs args) {
  screen(kernels, args, [this](const Row& row, const float* y, int panel) {
    const int channels = std::min(kLanes, weight_.n - panel * kLanes);
    const float most =
        channels == kLanes ? largest_of_16(load4(y), load4(y + 4), load4(y + 8), load4(y + 12)) : *std::max_element(y, y + channels);
    // The same addition as that of the fine plane's product, which is at most so large: rounding keeps the order.
    return most + panel_norms_[static_cast<size_t>(panel)] * row.slack;
  });
}

void Shortlist::leave_out(int row, int panel) {
  upper_[static_cast<size_t>(row) * panels() + static_cast<size_t>(panel)] = -std::numeric_limits<float>::infinity();
}

int Shortlist::most_promising(int row) const {
  const float* upper = upper_.data() + static_cast<size_t>(row) * panels();
  return static_cast<int>(std::max_element(upper, upper + panels()) - upper);
}

}  // namespace setpoint
