// Quantized matmul with AVX-512 VNNI: unsigned weight codes times signed activation codes, 4 products per int32 lane.
// Vectors run across the 16 channels of a panel; a tile keeps its int32 and float accumulators in registers.
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/matmul_walk.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h

namespace setpoint {
namespace {

inline __m512i broadcast4(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm512_set1_epi32(word);
}

// Inputs 4 Quad .. 4 QuadEnd of a step.
template <class Format, int Quad, int QuadEnd, int Rows, int Panels>
[[gnu::always_inline]] inline void dot(const Tile& t, const uint8_t* step, const int8_t* x, __m512i (&acc)[Rows][Panels]) {
  if constexpr (Quad < QuadEnd) {
    __m512i codes[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) codes[p] = quad_codes<Format::kCodes, Quad>(step + size_t(p) * t.panel_bytes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i four = broadcast4(x + size_t(r) * t.x_stride + Quad * 4);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], codes[p], four);
    }
    dot<Format, Quad + 1, QuadEnd>(t, step, x, acc);
  }
}

// One group of inputs: the dot product, and its float step onto y. `step` of the record, `g` within the step.
template <class Format, int Half, int Rows, int Panels>
[[gnu::always_inline]] inline void add_group(const Tile& t, const uint8_t* record, int step, int at, __m512 (&y)[Rows][Panels]) {
  const int term = at * Format::kStepGroups + Half, group = step * Format::kStepGroups + Half;
  __m512i acc[Rows][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p)
      acc[r][p] = Format::kAffine ? _mm512_setzero_si512() : _mm512_set1_epi32(t.offset[size_t(r) * t.term_stride + size_t(term)]);

  constexpr int kQuads = Format::kGroup / 4;
  dot<Format, Half * kQuads, Half * kQuads + kQuads>(t, record + Format::kScaleBytes + step * Format::kStepBytes, t.x + at * kStepInputs,
                                                     acc);

#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p) {
    const uint8_t* panel = record + size_t(p) * t.panel_bytes;
    const __m512 scale = group_scale<Format>(panel, group);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512 a = _mm512_set1_ps(t.a[size_t(r) * t.a_stride + size_t(at)]);
      y[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p]), _mm512_mul_ps(scale, a), y[r][p]);
    }
    if constexpr (Format::kAffine) {
      const __m512 minimum = group_min<Format>(panel, group);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
        y[r][p] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(t.a_sum[size_t(r) * t.term_stride + size_t(term)]), y[r][p]);
    }
  }
}

template <class Format, int Rows, int Panels>
__attribute__((noinline)) void run_tile(const Tile& t) {
  __m512 y[Rows][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) y[r][p] = _mm512_load_ps(t.y + r * kTileStride + p * kLanes);

  const uint8_t* record = t.data;
  for (int begin = 0; begin < t.steps; begin += Format::kSteps, record += Format::kRecordBytes) {
    const int steps = smaller(Format::kSteps, t.steps - begin);
    for (int s = 0; s < steps; ++s) {
      add_group<Format, 0>(t, record, s, begin + s, y);
      if constexpr (Format::kStepGroups == 2) add_group<Format, 1>(t, record, s, begin + s, y);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) _mm512_store_ps(t.y + r * kTileStride + p * kLanes, y[r][p]);
}

// 32 registers: 4 x 3 needs 24 accumulators, and up to 8 for codes and broadcasts.
template <class F>
struct Vnni {
  using Format = F;
  static constexpr int kTileRows = 4;
  static constexpr int kChunkBytes = 16384;  // of a 32 KiB L1
  static int panels(int rows) { return rows < 3 ? 4 : 3; }

  template <int Rows>
  static void run_rows(const Tile& t, int panels) {
    switch (panels) {
      case 1:
        return run_tile<Format, Rows, 1>(t);
      case 2:
        return run_tile<Format, Rows, 2>(t);
      case 3:
        return run_tile<Format, Rows, 3>(t);
      default:
        if constexpr (Rows < 3) return run_tile<Format, Rows, 4>(t);
    }
  }

  static void run(const Tile& t, int rows, int panels) {
    switch (rows) {
      case 1:
        return run_rows<1>(t, panels);
      case 2:
        return run_rows<2>(t, panels);
      case 3:
        return run_rows<3>(t, panels);
      default:
        return run_rows<4>(t, panels);
    }
  }
};

}  // namespace

void register_avx512_matmul(KernelTable& t) {
  t.matmul_quantized = matmul<Vnni>;
  register_avx512_matmul_float(t);
  register_avx512_quantize_rows(t);
}

}  // namespace setpoint
