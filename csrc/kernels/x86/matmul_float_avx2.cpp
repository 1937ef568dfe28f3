// Float matmul with AVX2: f32, f16 and bf16 weights, float32 arithmetic, one accumulator per output.
#include "kernels/x86/matmul_float_walk.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

namespace setpoint {
namespace {

template <Codes Kind>
inline __m256 load_weights(const uint8_t* at) {
  if constexpr (Kind == Codes::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  if constexpr (Kind == Codes::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// One panel, two vectors of 8 channels: 6 rows make 12 accumulators of the 16 registers.
template <Codes Kind, int Rows>
__attribute__((noinline)) void run_tile(const FloatTile& t) {
  constexpr size_t weight_bytes = Kind == Codes::f32 ? 4 : 2;
  __m256 acc[Rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int k = 0; k < t.count; ++k) {
    const uint8_t* data = t.data + size_t(k) * kLanes * weight_bytes;
    const __m256 first = load_weights<Kind>(data), second = load_weights<Kind>(data + 8 * weight_bytes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m256 x = _mm256_set1_ps(t.x[size_t(r) * t.x_stride + k]);
      acc[r][0] = _mm256_fmadd_ps(x, first, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(x, second, acc[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* y = t.y + r * kFloatStride + half * 8;
      _mm256_store_ps(y, _mm256_add_ps(_mm256_load_ps(y), acc[r][half]));
    }
}

template <Codes Kind>
struct Fma {
  static constexpr int kTileRows = 6;
  static constexpr size_t kWeightBytes = Kind == Codes::f32 ? 4 : 2;

  static void run(FloatTile t, int rows, int panels) {
    for (int p = 0; p < panels; ++p) {
      switch (rows) {
        case 1:
          run_tile<Kind, 1>(t);
          break;
        case 2:
          run_tile<Kind, 2>(t);
          break;
        case 3:
          run_tile<Kind, 3>(t);
          break;
        case 4:
          run_tile<Kind, 4>(t);
          break;
        case 5:
          run_tile<Kind, 5>(t);
          break;
        default:
          run_tile<Kind, 6>(t);
          break;
      }
      t.data += t.data_stride;
      t.y += kLanes;
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

void register_avx2_matmul_float(KernelTable& t) { t.matmul_float = matmul_float; }

}  // namespace setpoint
