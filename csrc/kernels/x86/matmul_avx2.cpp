// Quantized matmul with AVX2. Codes of at most 15 go through the byte multiply-add, whose 16-bit sums cannot
// saturate for a group of 32 (8 steps of 2 x 15 x 127); full bytes could, so they are widened first.
#include "kernels/x86/matmul_walk.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

namespace setpoint {
namespace {

inline __m256i load_codes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

inline __m256i broadcast4(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm256_set1_epi32(word);
}

inline __m256 load_scales(const Tile& t, const uint8_t* base, int half, int group) {
  const int index = group * kLanes + half * 8;
  if (!t.half_scales) return _mm256_loadu_ps(reinterpret_cast<const float*>(base) + index);
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(base + index * 2)));
}

// 32 inputs of u4: 4 lines of 2 x 8 channels x (4 low, 4 high) codes.
template <int Rows>
inline void dot_u4(const uint8_t* data, const int8_t* x, size_t x_stride, __m256i (&acc)[Rows][2]) {
  const __m256i low_bits = _mm256_set1_epi8(0x0f);
  __m256i sums[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i packed = load_codes(data + line * 64 + half * 32);
      const __m256i low = _mm256_and_si256(packed, low_bits);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const int8_t* codes = x + size_t(r) * x_stride + line * 8;
        const __m256i first = _mm256_maddubs_epi16(low, broadcast4(codes));
        const __m256i second = _mm256_maddubs_epi16(high, broadcast4(codes + 4));
        sums[r][half] = _mm256_add_epi16(sums[r][half], _mm256_add_epi16(first, second));
      }
    }
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(sums[r][half], ones));
}

// `Group` inputs of u8. Even and odd bytes are widened in place, so that every dword stays one channel.
template <int Group, int Rows>
inline void dot_u8(const uint8_t* data, const int8_t* x, size_t x_stride, __m256i (&acc)[Rows][2]) {
  const __m256i even_bytes = _mm256_set1_epi16(0x00ff);
  for (int line = 0; line < Group / 4; ++line) {
    const __m256i packed[2] = {load_codes(data + line * 64), load_codes(data + line * 64 + 32)};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m256i four = broadcast4(x + size_t(r) * x_stride + line * 4);
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

// One panel. The float accumulators live in the tile's y: 16 registers do not hold both kinds.
template <Codes Kind, int Group, bool Affine, int Rows>
__attribute__((noinline)) void run_tile(const Tile& t) {
  constexpr size_t group_bytes = Kind == Codes::u4 ? Group * kLanes / 2 : Group * kLanes;
  for (int g = 0; g < t.groups; ++g) {
    for (int i = 0; i < t.ahead_lines; ++i) _mm_prefetch(t.ahead + (g * t.ahead_lines + i) * 64, _MM_HINT_T1);
    __m256i acc[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      acc[r][0] = acc[r][1] = Affine ? _mm256_setzero_si256() : _mm256_set1_epi32(t.offset[r * kMaxChunkGroups + g]);

    const uint8_t* data = t.data + size_t(g) * group_bytes;
    if constexpr (Kind == Codes::u4)
      dot_u4<Rows>(data, t.x + g * Group, t.x_stride, acc);
    else
      dot_u8<Group, Rows>(data, t.x + g * Group, t.x_stride, acc);

#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = load_scales(t, t.scales, half, g);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        float* at = t.y + r * kTileStride + half * 8;
        const __m256 a = _mm256_set1_ps(t.a[size_t(r) * t.a_stride + g * Group / 32]);
        __m256 y = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][half]), _mm256_mul_ps(scale, a), _mm256_load_ps(at));
        if constexpr (Affine) {
          const __m256 a_sum = _mm256_set1_ps(t.a_sum[r * kMaxChunkGroups + g]);
          y = _mm256_fmadd_ps(load_scales(t, t.mins, half, g), a_sum, y);
        }
        _mm256_store_ps(at, y);
      }
    }
  }
}

template <Codes Kind, int Group, bool Affine>
struct Widening {
  static constexpr int kTileRows = 4;
  static constexpr int kChunkBytes = 16384;  // of a 32 KiB L1
  static int panels(int) { return kMaxTilePanels; }

  static void run(Tile t, int rows, int panels) {
    for (int p = 0; p < panels; ++p) {
      switch (rows) {
        case 1:
          run_tile<Kind, Group, Affine, 1>(t);
          break;
        case 2:
          run_tile<Kind, Group, Affine, 2>(t);
          break;
        case 3:
          run_tile<Kind, Group, Affine, 3>(t);
          break;
        default:
          run_tile<Kind, Group, Affine, 4>(t);
          break;
      }
      t.data += t.data_stride;
      t.scales += t.scale_stride;
      if constexpr (Affine) t.mins += t.scale_stride;
      t.y += kLanes;
      t.ahead_lines = 0;
    }
  }
};

template <Codes Kind, int Group>
void matmul(const MatmulArgs& m) {
  if (m.weight->affine)
    walk<Widening<Kind, Group, true>>(m);
  else
    walk<Widening<Kind, Group, false>>(m);
}

void matmul_u8(const MatmulArgs& m) {
  if (m.weight->group == 16)
    matmul<Codes::u8, 16>(m);
  else
    matmul<Codes::u8, 32>(m);
}

}  // namespace

void register_avx2_matmul(KernelTable& t) {
  t.matmul_u4 = matmul<Codes::u4, 32>;
  t.matmul_u8 = matmul_u8;
  register_avx2_matmul_float(t);
  register_avx2_quantize_rows(t);
}

}  // namespace setpoint
