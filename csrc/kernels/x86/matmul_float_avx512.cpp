// Float matmul with AVX-512: f32, f16 and bf16 weights, float32 arithmetic, one accumulator per output.
#include "kernels/x86/matmul_float_walk.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h

namespace setpoint {
namespace {

template <Codes Kind>
inline __m512 load_weights(const uint8_t* at) {
  if constexpr (Kind == Codes::f32) return _mm512_loadu_ps(at);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  if constexpr (Kind == Codes::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <Codes Kind, int Rows, int Panels>
__attribute__((noinline)) void run_tile(const FloatTile& t) {
  constexpr size_t input_bytes = kLanes * (Kind == Codes::f32 ? 4 : 2);
  __m512 acc[Rows][Panels];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_setzero_ps();

  for (int k = 0; k < t.count; ++k) {
    __m512 weights[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) weights[p] = load_weights<Kind>(t.data + size_t(p) * t.data_stride + size_t(k) * input_bytes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m512 x = _mm512_set1_ps(t.x[size_t(r) * t.x_stride + k]);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_fmadd_ps(x, weights[p], acc[r][p]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      float* y = t.y + r * kFloatStride + p * kLanes;
      _mm512_store_ps(y, _mm512_add_ps(_mm512_load_ps(y), acc[r][p]));
    }
}

// 32 registers: 6 x 4 is 24 accumulators, 4 weights and a broadcast.
template <Codes Kind>
struct Fma {
  static constexpr int kTileRows = 6;
  static constexpr size_t kWeightBytes = Kind == Codes::f32 ? 4 : 2;

  template <int Rows>
  static void run_rows(const FloatTile& t, int panels) {
    switch (panels) {
      case 1:
        return run_tile<Kind, Rows, 1>(t);
      case 2:
        return run_tile<Kind, Rows, 2>(t);
      case 3:
        return run_tile<Kind, Rows, 3>(t);
      default:
        return run_tile<Kind, Rows, 4>(t);
    }
  }

  static void run(const FloatTile& t, int rows, int panels) {
    switch (rows) {
      case 1:
        return run_rows<1>(t, panels);
      case 2:
        return run_rows<2>(t, panels);
      case 3:
        return run_rows<3>(t, panels);
      case 4:
        return run_rows<4>(t, panels);
      case 5:
        return run_rows<5>(t, panels);
      default:
        return run_rows<6>(t, panels);
    }
  }
};

void matmul_float(const MatmulArgs& m) {
  switch (m.weight->codes) {
    case Codes::f16:
      return walk_float<Fma<Codes::f16>>(m);
    case Codes::bf16:
      return walk_float<Fma<Codes::bf16>>(m);
    default:
      return walk_float<Fma<Codes::f32>>(m);
  }
}

}  // namespace

void register_avx512_matmul_float(KernelTable& t) { t.matmul_float = matmul_float; }

}  // namespace setpoint
