// The quantized matmul for many rows with AVX-512 VNNI. A tile of 4 rows x 3 panels keeps 12 int32 and 12 float
// accumulators in registers and does nothing beside them but loads: VNNI, multiplies and fused multiply-adds share two
// ports of a Zen 4, so 8 dot products, one multiply and one fma a group of 32 are its limit (docs/log.md).
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/matmul_gemm.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace setpoint {
namespace {

inline __m512i broadcast4(const void* at) {
  int32_t word;
  __builtin_memcpy(&word, at, 4);
  return _mm512_set1_epi32(word);
}

// Finishes a row: bias, then what out holds. Masked stores are slow on a Zen 4: only for the channels past the last.
template <bool Masked>
inline void store_panel(const GemmTile& t, __m512 y, float* out, const float* bias, __mmask16 lanes) {
  if (bias != nullptr) y = _mm512_add_ps(y, Masked ? _mm512_maskz_loadu_ps(lanes, bias) : _mm512_loadu_ps(bias));
  if (t.accumulate) y = _mm512_add_ps(y, Masked ? _mm512_maskz_loadu_ps(lanes, out) : _mm512_loadu_ps(out));
  if constexpr (Masked)
    _mm512_mask_storeu_ps(out, lanes, y);
  else
    _mm512_storeu_ps(out, y);
}

template <int Rows, int Panels>
inline void store_outputs(const GemmTile& t, const __m512 (&y)[Rows][Panels]) {
  const __mmask16 lanes = t.last_lanes;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    float* out = t.out + size_t(r) * t.out_stride;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const float* bias = t.bias == nullptr ? nullptr : t.bias + p * kLanes;
      if (p + 1 == Panels && lanes != 0xffff)
        store_panel<true>(t, y[r][p], out + p * kLanes, bias, lanes);
      else
        store_panel<false>(t, y[r][p], out + p * kLanes, bias, lanes);
    }
  }
}

template <int Group, bool Affine, int Rows, int Panels>
__attribute__((noinline)) void run_tile(const GemmTile& t) {
  constexpr int kDots = Group / 4;
  __m512 y[Rows][Panels];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) y[r][p] = t.first ? _mm512_setzero_ps() : _mm512_load_ps(t.y + (r * Panels + p) * kLanes);

  const uint8_t* weights = t.weights;
  const int8_t* x = t.x;
  const size_t x_stride = t.x_stride;
  const GemmRow* rows = t.rows;
  const uint8_t* ahead = t.ahead;
  const size_t ahead_stride = t.ahead_stride;
  const int ahead_lines = t.ahead_lines;
  for (int g = 0; g < t.groups; ++g) {
    for (int i = 0; i < ahead_lines; ++i, ahead += kLineBytes)
#pragma GCC unroll 4
      for (int p = 0; p < kGemmPanels; ++p) _mm_prefetch(ahead + size_t(p) * ahead_stride, _MM_HINT_T1);
    __m512i acc[Rows][Panels];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512i start = Affine ? _mm512_setzero_si512() : _mm512_set1_epi32(rows[r].offset[g]);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = start;
    }
#pragma GCC unroll 8
    for (int k = 0; k < kDots; ++k) {
      __m512i codes[Panels];
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) codes[p] = _mm512_load_si512(weights + (k * Panels + p) * kLineBytes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512i four = broadcast4(x + size_t(r) * x_stride + k * 4);
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], codes[p], four);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = _mm512_load_ps(weights + (kDots * Panels + p) * kLineBytes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(rows[r].a[g]));
        y[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p]), step, y[r][p]);
      }
      if constexpr (Affine) {
        const __m512 minimum = _mm512_load_ps(weights + ((kDots + 1) * Panels + p) * kLineBytes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) y[r][p] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(rows[r].a_sum[g]), y[r][p]);
      }
    }
    weights += (kDots + (Affine ? 2 : 1)) * Panels * kLineBytes;
    x += Group;
  }

  if (t.last) return store_outputs(t, y);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) _mm512_store_ps(t.y + (r * Panels + p) * kLanes, y[r][p]);
}

template <class F>
struct Gemm {
  using Format = F;
  static constexpr int kGroup = Format::kGroup;

  static int tile_rows(int panels) { return panels == 3 ? 4 : panels == 2 ? 5 : 8; }

  static void fill_row(const PackedWeight& w, int steps, const int32_t* sums, const float* a, GemmRow& to) {
    const uint32_t halves = uint32_t((uint64_t(1) << (2 * steps)) - 1);
    const __m512 scales = _mm512_maskz_loadu_ps(__mmask16((uint32_t(1) << steps) - 1), a);
    __m512i sum = _mm512_maskz_loadu_epi32(__mmask16(halves), sums);
    if constexpr (kGroup == 16) {
      const __m512i step = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      store_row_terms(w, _mm512_permutexvar_ps(step, scales), sum, to);
    } else {
      const __m512i more = _mm512_maskz_loadu_epi32(__mmask16(halves >> 16), sums + 16);
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      sum = _mm512_add_epi32(_mm512_permutex2var_epi32(sum, even, more), _mm512_permutex2var_epi32(sum, odd, more));
      store_row_terms(w, scales, sum, to);
    }
  }

  static void store_row_terms(const PackedWeight& w, __m512 a, __m512i sum, GemmRow& to) {
    _mm512_storeu_ps(to.a, a);
    if constexpr (Format::kAffine)
      _mm512_storeu_ps(to.a_sum, _mm512_mul_ps(a, _mm512_cvtepi32_ps(sum)));
    else
      _mm512_storeu_si512(to.offset, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-w.zero_point)));
  }

  template <int Quad>
  [[gnu::always_inline]] static inline void unpack_quad(const uint8_t* step, uint8_t* to) {
    _mm512_store_si512(to, quad_codes<Format::kCodes, Quad>(step));
  }

  static void unpack_scales(const uint8_t* record, int group, uint8_t* to, size_t stride) {
    _mm512_storeu_ps(to, group_scale<Format>(record, group));
    if constexpr (Format::kAffine) _mm512_storeu_ps(to + stride, group_min<Format>(record, group));
  }

  template <int Rows, int Panels>
  static void run_rows(const GemmTile& t, int rows) {
    if constexpr (Rows > 1)
      if (rows < Rows) return run_rows<Rows - 1, Panels>(t, rows);
    run_tile<kGroup, Format::kAffine, Rows, Panels>(t);
  }

  static void run(const GemmTile& t, int rows, int panels) {
    if (panels == 3) return run_rows<4, 3>(t, rows);
    if (panels == 2) return run_rows<5, 2>(t, rows);
    run_rows<8, 1>(t, rows);
  }
};

}  // namespace

void matmul_gemm_avx512(const MatmulArgs& m) {
  visit_format(*m.weight, [&m](auto format) { walk_gemm<Gemm<decltype(format)>>(m); });
}

}  // namespace setpoint
