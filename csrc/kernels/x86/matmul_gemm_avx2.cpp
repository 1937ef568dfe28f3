// The quantized matmul for many rows with AVX2: tiles of 4 rows x 1 panel over unpacked weights. The running outputs
// stay in L1, since 16 registers do not hold them beside the integer sums.
#include "kernels/x86/codes_avx2.h"
#include "kernels/x86/matmul_gemm.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

namespace setpoint {
namespace {

// Codes of at most 6 bits: 16-bit sums of byte products, widened before they could saturate.
template <Codes Kind, int Group, int Rows>
[[gnu::always_inline]] inline void dot_small(const uint8_t* line, size_t stride, const int8_t* x, size_t x_stride,
                                             __m256i (&acc)[Rows][2]) {
  constexpr int kQuads = Group / 4, kRun = quads_per_sum(Kind) < kQuads ? quads_per_sum(Kind) : kQuads;
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int begin = 0; begin < kQuads; begin += kRun) {
    __m256i sums[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1  // unrolled, GCC spills the sums
    for (int quad = begin; quad < begin + kRun; ++quad)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m256i four = broadcast4(x + size_t(r) * x_stride + quad * 4);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i products = _mm256_maddubs_epi16(load_half_line(line + size_t(quad) * stride + half * 32), four);
          sums[r][half] = _mm256_add_epi16(sums[r][half], products);
        }
      }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i wide = _mm256_madd_epi16(sums[r][half], ones);
        acc[r][half] = begin == 0 ? wide : _mm256_add_epi32(acc[r][half], wide);
      }
  }
}

// Full bytes: even and odd ones are widened in place, so that every dword stays one channel.
template <int Group, int Rows>
[[gnu::always_inline]] inline void dot_bytes(const uint8_t* line, size_t stride, const int8_t* x, size_t x_stride,
                                             __m256i (&acc)[Rows][2]) {
  const __m256i even_bytes = _mm256_set1_epi16(0x00ff);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int quad = 0; quad < Group / 4; ++quad, line += stride) {
    const __m256i codes[2] = {load_half_line(line), load_half_line(line + 32)};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m256i four = broadcast4(x + size_t(r) * x_stride + quad * 4);
      const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), x_odd = _mm256_srai_epi16(four, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes[half], even_bytes), x_even);
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes[half], 8), x_odd);
        acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_add_epi32(even, odd));
      }
    }
  }
}

// One panel of the tile: its lines are `stride` apart, the rows of y `y_stride`.
template <Codes Kind, int Group, bool Affine, int Rows>
__attribute__((noinline)) void run_tile(const GemmTile& t, const uint8_t* weights, size_t stride, float* y, size_t y_stride) {
  constexpr int kDots = Group / 4;
  const int8_t* x = t.x;
  for (int g = 0; g < t.groups; ++g, x += Group, weights += size_t(kDots + (Affine ? 2 : 1)) * stride) {
    __m256i acc[Rows][2];
    if constexpr (Kind == Codes::u8)
      dot_bytes<Group>(weights, stride, x, t.x_stride, acc);
    else
      dot_small<Kind, Group>(weights, stride, x, t.x_stride, acc);
    const uint8_t* scales = weights + kDots * stride;
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* at = y + size_t(r) * y_stride + half * 8;
        const __m256 scale = _mm256_mul_ps(load_floats(scales + half * 32), _mm256_set1_ps(t.rows[r].a[g]));
        const __m256i dot = Affine ? acc[r][half] : _mm256_add_epi32(acc[r][half], _mm256_set1_epi32(t.rows[r].offset[g]));
        __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, _mm256_load_ps(at));
        if constexpr (Affine) sum = _mm256_fmadd_ps(load_floats(scales + stride + half * 32), _mm256_set1_ps(t.rows[r].a_sum[g]), sum);
        _mm256_store_ps(at, sum);
      }
  }
}

void store_outputs(const GemmTile& t, int rows, int panels) {
  int channels = (panels - 1) * kLanes;
  for (int lanes = t.last_lanes; lanes != 0; lanes >>= 1) ++channels;
  for (int r = 0; r < rows; ++r) {
    const float* y = t.y + r * panels * kLanes;
    float* out = t.out + size_t(r) * t.out_stride;
    for (int c = 0; c < channels; ++c) {
      float value = y[c];
      if (t.bias != nullptr) value = value + t.bias[c];
      if (t.accumulate) value = value + out[c];
      out[c] = value;
    }
  }
}

template <class F>
struct Gemm {
  using Format = F;

  static int tile_rows(int) { return 4; }

  static void fill_row(const PackedWeight& w, int steps, const int32_t* sums, const float* a, GemmRow& to) {
    for (int g = 0; g < steps * Format::kStepGroups; ++g) {
      const int32_t sum = Format::kStepGroups == 2 ? sums[g] : sums[2 * g] + sums[2 * g + 1];
      to.a[g] = a[g / Format::kStepGroups];
      if (Format::kAffine)
        to.a_sum[g] = to.a[g] * float(sum);
      else
        to.offset[g] = -w.zero_point * sum;
    }
  }

  template <int Quad>
  [[gnu::always_inline]] static inline void unpack_quad(const uint8_t* step, uint8_t* to) {
    for (int half = 0; half < 2; ++half)
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + half * 32), quad_codes<Format::kCodes, Quad>(step + half * 32));
  }

  static void unpack_scales(const uint8_t* record, int group, uint8_t* to, size_t stride) {
    for (int half = 0; half < 2; ++half) {
      store_floats(to + half * 32, group_scale<Format>(record, half, group));
      if constexpr (Format::kAffine) store_floats(to + stride + half * 32, group_min<Format>(record, half, group));
    }
  }

  template <int Rows>
  static void run_rows(const GemmTile& t, int rows, int panels) {
    if constexpr (Rows > 1)
      if (rows < Rows) return run_rows<Rows - 1>(t, rows, panels);
    for (int p = 0; p < panels; ++p)
      run_tile<Format::kCodes, Format::kGroup, Format::kAffine, Rows>(t, t.weights + p * kLineBytes, size_t(panels) * kLineBytes,
                                                                      t.y + p * kLanes, size_t(panels) * kLanes);
  }

  static void run(const GemmTile& t, int rows, int panels) {
    for (int i = 0; i < t.ahead_lines * t.groups; ++i)
      for (int p = 0; p < kGemmPanels; ++p) _mm_prefetch(t.ahead + i * kLineBytes + size_t(p) * t.ahead_stride, _MM_HINT_T1);
    if (t.first)
      for (int i = 0; i < rows * panels * kLanes; ++i) t.y[i] = 0;
    run_rows<4>(t, rows, panels);
    if (t.last) store_outputs(t, rows, panels);
  }
};

}  // namespace

void matmul_gemm_avx2(const MatmulArgs& m) {
  visit_format(*m.weight, [&m](auto format) { walk_gemm<Gemm<decltype(format)>>(m); });
}

}  // namespace setpoint
