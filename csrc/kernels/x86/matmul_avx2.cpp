// Quantized matmul with AVX2. Codes of at most 6 bits go through the byte multiply-add, whose 16-bit sums are
// widened before they could saturate; full bytes could saturate at once, so they are widened first.
#include "kernels/x86/codes_avx2.h"
#include "kernels/x86/matmul_walk.h"
#include "kernels/x86/planes.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

namespace setpoint {
namespace {

// Inputs 4 Quad .. 4 QuadEnd of a step, for both halves of the channels.
template <Codes Kind, int Quad, int QuadEnd, int Rows>
[[gnu::always_inline]] inline void add_to_sums(const uint8_t* step, const int8_t* x, size_t x_stride, __m256i (&sums)[Rows][2]) {
  if constexpr (Quad < QuadEnd) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i codes = quad_codes<Kind, Quad>(step + half * 32);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        sums[r][half] = _mm256_add_epi16(sums[r][half], _mm256_maddubs_epi16(codes, broadcast4(x + size_t(r) * x_stride + Quad * 4)));
    }
    add_to_sums<Kind, Quad + 1, QuadEnd>(step, x, x_stride, sums);
  }
}

template <Codes Kind, int Quad, int QuadEnd, int Rows>
[[gnu::always_inline]] inline void dot_small(const uint8_t* step, const int8_t* x, size_t x_stride, __m256i (&acc)[Rows][2]) {
  if constexpr (Quad < QuadEnd) {
    constexpr int kEnd = Quad + quads_per_sum(Kind) < QuadEnd ? Quad + quads_per_sum(Kind) : QuadEnd;
    __m256i sums[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    add_to_sums<Kind, Quad, kEnd>(step, x, x_stride, sums);
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(sums[r][half], ones));
    dot_small<Kind, kEnd, QuadEnd>(step, x, x_stride, acc);
  }
}

// u8. Even and odd bytes are widened in place, so that every dword stays one channel.
template <int Quad, int QuadEnd, int Rows>
[[gnu::always_inline]] inline void dot_bytes(const uint8_t* step, const int8_t* x, size_t x_stride, __m256i (&acc)[Rows][2]) {
  const __m256i even_bytes = _mm256_set1_epi16(0x00ff);
  for (int quad = Quad; quad < QuadEnd; ++quad) {
    const __m256i packed[2] = {load_half_line(step + quad * kLineBytes), load_half_line(step + quad * kLineBytes + 32)};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m256i four = broadcast4(x + size_t(r) * x_stride + quad * 4);
      const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), x_odd = _mm256_srai_epi16(four, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(packed[half], even_bytes), x_even);
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(packed[half], 8), x_odd);
        acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_add_epi32(even, odd));
      }
    }
  }
}

// One group of inputs: the dot product, and its float step onto the tile's y (16 registers do not hold both kinds).
template <class Format, int Half, int Rows>
[[gnu::always_inline]] inline void add_group(const Tile& t, const uint8_t* record, int step, int at) {
  constexpr int kQuads = Format::kGroup / 4, kQuad = Half * kQuads;
  const int term = at * Format::kStepGroups + Half, group = step * Format::kStepGroups + Half;
  const uint8_t* codes = record + Format::kScaleBytes + step * Format::kStepBytes;
  const int8_t* x = t.x + at * kStepInputs;
  __m256i acc[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
    acc[r][0] = acc[r][1] =
        Format::kAffine ? _mm256_setzero_si256() : _mm256_set1_epi32(t.offset[size_t(r) * t.term_stride + size_t(term)]);
  if constexpr (Format::kCodes == Codes::u8)
    dot_bytes<kQuad, kQuad + kQuads>(codes, x, t.x_stride, acc);
  else
    dot_small<Format::kCodes, kQuad, kQuad + kQuads>(codes, x, t.x_stride, acc);

#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256 scale = group_scale<Format>(record, half, group);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      float* out = t.y + r * kTileStride + half * 8;
      const __m256 a = _mm256_set1_ps(t.a[size_t(r) * t.a_stride + size_t(at)]);
      __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][half]), _mm256_mul_ps(scale, a), _mm256_load_ps(out));
      if constexpr (Format::kAffine) {
        const __m256 a_sum = _mm256_set1_ps(t.a_sum[size_t(r) * t.term_stride + size_t(term)]);
        y = _mm256_fmadd_ps(group_min<Format>(record, half, group), a_sum, y);
      }
      _mm256_store_ps(out, y);
    }
  }
}

// One panel.
template <class Format, int Rows>
__attribute__((noinline)) void run_tile(const Tile& t) {
  const uint8_t* record = t.data;
  for (int begin = 0; begin < t.steps; begin += Format::kSteps, record += Format::kRecordBytes) {
    const int steps = smaller(Format::kSteps, t.steps - begin);
    for (int s = 0; s < steps; ++s) {
      add_group<Format, 0, Rows>(t, record, s, begin + s);
      if constexpr (Format::kStepGroups == 2) add_group<Format, 1, Rows>(t, record, s, begin + s);
    }
  }
}

template <class F>
struct Widening {
  using Format = F;
  static constexpr int kTileRows = 4;
  static constexpr int kChunkBytes = 16384;  // of a 32 KiB L1
  static int panels(int) { return kMaxTilePanels; }

  static void run(Tile t, int rows, int panels) {
    for (int p = 0; p < panels; ++p, t.data += t.panel_bytes, t.y += kLanes) switch (rows) {
        case 1:
          run_tile<Format, 1>(t);
          break;
        case 2:
          run_tile<Format, 2>(t);
          break;
        case 3:
          run_tile<Format, 3>(t);
          break;
        default:
          run_tile<Format, 4>(t);
          break;
      }
  }
};

constexpr int kGemmMinRows = 16;  // from here on unpacking the weights once pays

void matmul_any_rows(const MatmulArgs& m) {
  if (m.row_end - m.row_begin >= kGemmMinRows) return matmul_gemm_avx2(m);
  matmul_planes<matmul<Widening>>(m);
}

}  // namespace

void register_avx2_matmul(KernelTable& t) {
  t.matmul_quantized = matmul_any_rows;
  register_avx2_matmul_float(t);
  register_avx2_quantize_rows(t);
}

}  // namespace setpoint
