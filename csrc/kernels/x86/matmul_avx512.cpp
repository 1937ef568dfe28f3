// Quantized matmul with AVX-512 VNNI: unsigned weight codes times signed activation codes, 4 products per int32 lane.
// Vectors run across the 16 channels of a panel; a tile keeps its int32 and float accumulators in registers.
#include "kernels/x86/codes_avx512.h"
#include "kernels/x86/few_rows.h"
#include "kernels/x86/variants.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h

namespace setpoint {
namespace {

[[gnu::always_inline]] inline __m512i broadcast4(const int8_t* codes) {
  int32_t word;
  __builtin_memcpy(&word, codes, 4);
  return _mm512_set1_epi32(word);
}

// The dot products of 16 inputs.
template <class Format, int Half, int Rows>
[[gnu::always_inline]] inline void dot(const uint8_t* step, const StepInputs<Format, Rows>& in, __m512i (&acc)[Rows]) {
  __m512i codes[4];
  half_step_codes<Format::kCodes, Half>(step, codes);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r] = _mm512_dpbusd_epi32(acc[r], codes[i], broadcast4(in.codes[r] + (Half * 4 + i) * 4));
}

// Group `Group` of step `step` of a record: the dot product, and its float step onto y.
template <class Format, int Group, int Rows>
[[gnu::always_inline]] inline void add_group(const uint8_t* record, int step, const StepInputs<Format, Rows>& in, __m512 (&y)[Rows]) {
  const uint8_t* codes = record + Format::kScaleBytes + step * Format::kStepBytes;
  const int group = step * Format::kStepGroups + Group;
  __m512i acc[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) acc[r] = Format::kAffine ? _mm512_setzero_si512() : _mm512_set1_epi32(in.offset[Group][r]);
  dot<Format, Group>(codes, in, acc);
  if constexpr (Format::kStepGroups == 1) dot<Format, 1>(codes, in, acc);

  const __m512 scale = group_scale<Format>(record, group);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
    y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]), _mm512_mul_ps(scale, _mm512_set1_ps(in.scale[r])), y[r]);
  if constexpr (Format::kAffine) {
    const __m512 minimum = group_min<Format>(record, group);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) y[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(in.scaled_sum[Group][r]), y[r]);
  }
}

// With few rows the hardware prefetcher keeps up; the longer a step computes, the less far ahead it looks.
constexpr int kAheadRows = 5;
constexpr int kAheadBytes = 2048;

template <class Format>
[[gnu::always_inline]] inline void fetch_ahead(const uint8_t* record, int step) {
  const uint8_t* ahead = record + kAheadBytes + step * Format::kStepBytes;
#pragma GCC unroll 8
  for (int i = 0; i < Format::kStepBytes / kLineBytes; ++i) _mm_prefetch(ahead + i * kLineBytes, _MM_HINT_T0);
}

struct Vnni {
  template <class Format, int Rows>
  [[gnu::always_inline]] static inline void run_tile(const uint8_t* record, const StepInputs<Format, Rows>* in, int steps,
                                                     float (&out)[Rows][16]) {
    __m512 y[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) y[r] = _mm512_load_ps(out[r]);
    for (; steps > 0; steps -= Format::kSteps, record += Format::kRecordBytes) {
      const int end = steps < Format::kSteps ? steps : Format::kSteps;
      for (int s = 0; s < end; ++s, ++in) {
        if constexpr (Rows >= kAheadRows) fetch_ahead<Format>(record, s);
        add_group<Format, 0>(record, s, *in, y);
        if constexpr (Format::kStepGroups == 2) add_group<Format, 1>(record, s, *in, y);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) _mm512_store_ps(out[r], y[r]);
  }

  // Sums of the tile's rows to the outputs of a panel.
  template <int Rows>
  static void finish(const MatmulArgs& m, const float (&y)[Rows][16], int row, int panel) {
    const int planes = m.fine.codes == nullptr ? 1 : 2, channel = panel * 16, channels = m.weight->n - channel;
    const __mmask16 valid = channels < 16 ? __mmask16((1u << channels) - 1) : __mmask16(0xffff);
    for (int r = 0; r < Rows; r += planes) {
      float* out = m.out + size_t(row + r / planes) * m.out_stride + channel;
      __m512 value = _mm512_load_ps(y[r]);
      if (m.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, m.bias + channel));
      if (m.accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(valid, out));
      if (planes == 2) value = _mm512_add_ps(_mm512_load_ps(y[r + 1 < Rows ? r + 1 : r]), value);
      _mm512_mask_storeu_ps(out, valid, value);
    }
  }
};

// From how many rows on unpacking the weights once pays: a second tile of few rows costs little while the gathered
// activations of a call stay in L1.
int gemm_min_rows(int k) { return k <= 2048 ? 17 : 9; }

void matmul_any_rows(const MatmulArgs& m) {
  const int planes = m.fine.codes == nullptr ? 1 : 2;
  if ((m.row_end - m.row_begin) * planes >= gemm_min_rows(m.weight->k)) return matmul_gemm_avx512(m);
  matmul_few_rows<Vnni>(m);
}

}  // namespace

void register_avx512_matmul(KernelTable& t) {
  t.matmul_quantized = matmul_any_rows;
  register_avx512_matmul_float(t);
  register_avx512_quantize_rows(t);
}

}  // namespace setpoint
