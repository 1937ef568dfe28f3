// Quantized matmul with AVX-512 VNNI: unsigned weight codes times signed activation codes, 4 products per int32 lane.
// Vectors run across the 16 channels of a panel; a tile keeps its int32 and float accumulators in registers.
#include "kernels/x86/matmul_walk.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h

namespace setpoint {
namespace {

template <bool Half>
inline __m512 load_scales(const uint8_t* at) {
  if constexpr (Half) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return _mm512_loadu_ps(at);
}

inline __m512 load_scales(const Tile& t, const uint8_t* base, int panel, int group) {
  const size_t panel_at = size_t(panel) * t.scale_stride;
  return t.half_scales ? load_scales<true>(base + panel_at + size_t(group) * 32) : load_scales<false>(base + panel_at + size_t(group) * 64);
}

inline __m512i broadcast4(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm512_set1_epi32(word);
}

// 32 inputs of u4: 4 lines of 16 channels x (4 low, 4 high) codes.
template <int Rows, int Panels>
inline void dot_u4(const Tile& t, const uint8_t* data, const int8_t* x, __m512i (&acc)[Rows][Panels]) {
  const __m512i low_bits = _mm512_set1_epi8(0x0f);
#pragma GCC unroll 4
  for (int line = 0; line < 4; ++line) {
    __m512i codes[Panels], high[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const __m512i packed = _mm512_loadu_si512(data + size_t(p) * t.data_stride + line * 64);
      codes[p] = _mm512_and_si512(packed, low_bits);
      high[p] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_bits);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512i first = broadcast4(x + size_t(r) * t.x_stride + line * 8);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], codes[p], first);
      const __m512i second = broadcast4(x + size_t(r) * t.x_stride + line * 8 + 4);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], high[p], second);
    }
  }
}

// `Group` inputs of u8: lines of 16 channels x 4 codes.
template <int Group, int Rows, int Panels>
inline void dot_u8(const Tile& t, const uint8_t* data, const int8_t* x, __m512i (&acc)[Rows][Panels]) {
#pragma GCC unroll 8
  for (int line = 0; line < Group / 4; ++line) {
    __m512i codes[Panels];
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) codes[p] = _mm512_loadu_si512(data + size_t(p) * t.data_stride + line * 64);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512i four = broadcast4(x + size_t(r) * t.x_stride + line * 4);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], codes[p], four);
    }
  }
}

template <Codes Kind, int Group, bool Affine, int Rows, int Panels>
__attribute__((noinline)) void run_tile(const Tile& t) {
  constexpr size_t group_bytes = Kind == Codes::u4 ? Group * kLanes / 2 : Group * kLanes;
  __m512 y[Rows][Panels];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) y[r][p] = _mm512_load_ps(t.y + r * kTileStride + p * kLanes);

  for (int g = 0; g < t.groups; ++g) {
    __m512i acc[Rows][Panels];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) acc[r][p] = Affine ? _mm512_setzero_si512() : _mm512_set1_epi32(t.offset[r * kMaxChunkGroups + g]);

    for (int i = 0; i < t.ahead_lines; ++i) _mm_prefetch(t.ahead + (g * t.ahead_lines + i) * 64, _MM_HINT_T1);

    const uint8_t* data = t.data + size_t(g) * group_bytes;
    if constexpr (Kind == Codes::u4)
      dot_u4<Rows, Panels>(t, data, t.x + g * Group, acc);
    else
      dot_u8<Group, Rows, Panels>(t, data, t.x + g * Group, acc);

#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = load_scales(t, t.scales, p, g);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m512 a = _mm512_set1_ps(t.a[size_t(r) * t.a_stride + g * Group / 32]);
        y[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p]), _mm512_mul_ps(scale, a), y[r][p]);
      }
      if constexpr (Affine) {
        const __m512 minimum = load_scales(t, t.mins, p, g);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) y[r][p] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(t.a_sum[r * kMaxChunkGroups + g]), y[r][p]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) _mm512_store_ps(t.y + r * kTileStride + p * kLanes, y[r][p]);
}

// 32 registers: 4 x 3 needs 24 accumulators, and up to 8 for codes and broadcasts.
template <Codes Kind, int Group, bool Affine>
struct Vnni {
  static constexpr int kTileRows = 4;
  static constexpr int kChunkBytes = 16384;  // of a 32 KiB L1
  static int panels(int rows) { return rows < 3 ? 4 : 3; }

  template <int Rows>
  static void run_rows(const Tile& t, int panels) {
    switch (panels) {
      case 1:
        return run_tile<Kind, Group, Affine, Rows, 1>(t);
      case 2:
        return run_tile<Kind, Group, Affine, Rows, 2>(t);
      case 3:
        return run_tile<Kind, Group, Affine, Rows, 3>(t);
      default:
        if constexpr (Rows < 3) return run_tile<Kind, Group, Affine, Rows, 4>(t);
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

template <Codes Kind, int Group>
void matmul(const MatmulArgs& m) {
  if (m.weight->affine)
    walk<Vnni<Kind, Group, true>>(m);
  else
    walk<Vnni<Kind, Group, false>>(m);
}

void matmul_u8(const MatmulArgs& m) {
  if (m.weight->group == 16)
    matmul<Codes::u8, 16>(m);
  else
    matmul<Codes::u8, 32>(m);
}

}  // namespace

void register_avx512_matmul(KernelTable& t) {
  t.matmul_u4 = matmul<Codes::u4, 32>;
  t.matmul_u8 = matmul_u8;
  register_avx512_matmul_float(t);
  register_avx512_quantize_rows(t);
}

}  // namespace setpoint
