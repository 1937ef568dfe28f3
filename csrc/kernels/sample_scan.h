// The vector loops over the vocabulary, written once with explicit lanes and compiled per ISA.
//
// W is the machine's vector width in floats; 16 lanes are 16 / W vectors, so every W does the same operations on the
// same lanes in the same order: no fused multiply-add, no reassociation. Everything is in an anonymous namespace
// because the including units are compiled for different ISAs (kernels.h).
#pragma once
#include <cstddef>
#include <cstdint>

namespace setpoint {

struct SampleScans {
  // tile_max[t] = maximum of tile t (NaN left out); returns true when some x is NaN or +inf.
  bool (*maxima)(const float* x, int n, float* tile_max);
  // w[i] = exp((x[i] - max) * inverse_temperature), 0 where that is below `floor` or underflows; max >= every x.
  // tile_sum[t] = sum of tile t.
  void (*weights)(const float* x, int n, float max, float inverse_temperature, float floor, float* w, float* tile_sum);
  // x[i] = -inf where bit i % 32 of word i / 32 is not set.
  void (*mask)(float* x, int n, const uint32_t* words);
};

extern const SampleScans kSampleScansAvx2;
extern const SampleScans kSampleScansAvx512;

namespace {

constexpr int kTile = 256;
constexpr int kLanes = 16;
constexpr float kInfinity = __builtin_inff();

template <int W>
struct Vector {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
  typedef uint32_t Bits __attribute__((vector_size(W * 4)));

  static Float load(const float* p) {
    Float v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
};

// exp(y) for y <= 0, at most 2 ulp; exp(0) is exactly 1; 0 below -87, so that no result is subnormal.
// exp(y) = 2^n * exp(r), r in [-ln2/2, ln2/2]; two-part ln2 and the polynomial of Cephes expf (S. L. Moshier).
template <int W>
inline typename Vector<W>::Float exp_negative(typename Vector<W>::Float y) {
  using Float = typename Vector<W>::Float;
  using Bits = typename Vector<W>::Bits;               // wraps where y is far below -87, in lanes that are dropped
  const Float shifted = y * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer held in the low bits
  const Float n = shifted - 12582912.f;
  const Float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.f;
  const Bits exponent = ((Bits)shifted - 0x4B400000u) << 23;
  const Float scaled = (Float)((Bits)p + exponent);
  return y < -87.f ? Float{} : scaled;
}

template <int W>
inline float tile_maximum(const float* x, bool* bad) {
  using V = Vector<W>;
  typename V::Float best = V::load(x);
  typename V::Int wrong = ~(best < kInfinity);
  best = best < kInfinity ? best : typename V::Float{} - kInfinity;
  for (int i = W; i < kTile; i += W) {
    const typename V::Float v = V::load(x + i);
    wrong |= ~(v < kInfinity);
    best = v > best ? v : best;
  }
  float lane_max[W];
  V::store(lane_max, best);
  int32_t any = 0;
  for (int l = 0; l < W; ++l) any |= wrong[l];
  *bad |= any != 0;
  float maximum = lane_max[0];
  for (int l = 1; l < W; ++l) maximum = lane_max[l] > maximum ? lane_max[l] : maximum;
  return maximum;
}

template <int W>
inline float tile_weights(const float* x, float max, float inverse_temperature, float floor, float* w) {
  using V = Vector<W>;
  typename V::Float sum[kLanes / W] = {};
  for (int i = 0; i < kTile; i += kLanes) {
    for (int j = 0; j < kLanes / W; ++j) {
      const typename V::Float e = exp_negative<W>((V::load(x + i + j * W) - max) * inverse_temperature);
      const typename V::Float kept = e < floor ? typename V::Float{} : e;
      V::store(w + i + j * W, kept);
      sum[j] += kept;
    }
  }
  float lane[kLanes];
  for (int j = 0; j < kLanes / W; ++j) V::store(lane + j * W, sum[j]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// The last tile is filled up with -inf, which has weight 0.
inline void fill_tile(const float* x, int n, float* tile) {
  for (int i = 0; i < kTile; ++i) tile[i] = i < n ? x[i] : -kInfinity;
}

template <int W>
bool scan_maxima(const float* x, int n, float* tile_max) {
  bool bad = false;
  const int whole = n / kTile;
  for (int t = 0; t < whole; ++t) tile_max[t] = tile_maximum<W>(x + static_cast<ptrdiff_t>(t) * kTile, &bad);
  if (n % kTile) {
    float tile[kTile];
    fill_tile(x + static_cast<ptrdiff_t>(whole) * kTile, n % kTile, tile);
    tile_max[whole] = tile_maximum<W>(tile, &bad);
  }
  return bad;
}

template <int W>
void scan_weights(const float* x, int n, float max, float inverse_temperature, float floor, float* w, float* tile_sum) {
  const int whole = n / kTile;
  for (int t = 0; t < whole; ++t) {
    const ptrdiff_t first = static_cast<ptrdiff_t>(t) * kTile;
    tile_sum[t] = tile_weights<W>(x + first, max, inverse_temperature, floor, w + first);
  }
  if (const int rest = n % kTile) {
    const ptrdiff_t first = static_cast<ptrdiff_t>(whole) * kTile;
    float tile[kTile], kept[kTile];
    fill_tile(x + first, rest, tile);
    tile_sum[whole] = tile_weights<W>(tile, max, inverse_temperature, floor, kept);
    for (int i = 0; i < rest; ++i) w[first + i] = kept[i];
  }
}

template <int W>
void scan_mask(float* x, int n, const uint32_t* words) {
  using V = Vector<W>;
  uint32_t lane[W];
  for (int l = 0; l < W; ++l) lane[l] = 1u << l;
  typename V::Bits lane_bits;
  __builtin_memcpy(&lane_bits, lane, sizeof lane_bits);
  const int whole = n / 32;
  for (int i = 0; i < whole; ++i) {
    if (words[i] == ~0u) continue;
    for (int j = 0; j < 32; j += W) {
      float* at = x + static_cast<ptrdiff_t>(i) * 32 + j;
      const typename V::Bits bits = (typename V::Bits{} + (words[i] >> j)) & lane_bits;
      V::store(at, bits != 0u ? V::load(at) : typename V::Float{} - kInfinity);
    }
  }
  for (int i = whole * 32; i < n; ++i)
    if ((words[whole] >> i % 32 & 1) == 0) x[i] = -kInfinity;
}

}  // namespace
}  // namespace setpoint
