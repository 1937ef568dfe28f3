// The kernel contract: what every op computes, in which order, and the table that holds its variants.
//
// Law 1 (batch invariance) is kept here. For every output element the sequence of floating-point operations is
// fixed by this header and is the same for every tile, thread count, ISA and batch: vectors run ACROSS outputs,
// each output owns one float accumulator, float steps happen in ascending order, fused multiply-add is written
// explicitly (std::fma / _mm*_fmadd_ps), and -ffp-contract=off keeps the compiler from adding others.
// So all ISA variants are bit-equal to ref/, and the tests assert exactly that.
//
// x86/ translation units are compiled for their ISA: they may not define or instantiate anything with external
// linkage that another unit could link (no std:: containers, no inline functions from shared headers that are
// not force-inlined): everything in anonymous namespaces except the register function.
#pragma once
#include <cstddef>
#include <cstdint>

namespace setpoint {

// Changes with everything here that changes a bit of a result: saved keys and values of another version are not read.
constexpr int kNumericVersion = 1;

// ---------------------------------------------------------------------------------------------- quantized matmul
// Packed weight: N output channels in panels of 16 (zero padded), K inputs.
//   f32/f16/bf16 : data[panel][k][16 channels]
//   u2 .. u8     : data[panel][record]: codes of 2 to 8 bits and their scales as one linear stream; packed_layout.h
// w = scale * (code - zero_point)  or, affine,  scale * code + min, one scale and min per (channel, `group` inputs).
enum class Codes : uint8_t { f32, f16, bf16, u2, u3, u4, u5, u6, u8 };
// How a group's scale (and min) is stored: one f16, or a signed byte times an f16 that 256 inputs share. The product
// has at most 19 significant bits: exact in f32.
enum class ScaleType : uint8_t { f16, sub8 };

struct PackedWeight {
  Codes codes = Codes::f32;
  ScaleType scale_type = ScaleType::f16;
  bool affine = false;
  int zero_point = 0;  // symmetric formats: Q4_0 8, Q5_0 16, Q8_0 128 (codes are s8 + 128), Q6_K 32, Q3_K 4
  int group = 0;       // 32 or 16; 0 for float weights
  int n = 0;           // output channels
  int k = 0;           // inputs; a multiple of 32 for quantized codes, of 256 for sub8 scales
  const uint8_t* data = nullptr;
  int panels() const { return (n + 15) / 16; }
  bool is_quantized() const { return codes >= Codes::u2; }  // reads QuantizedRows
};

// Activations quantized per (row, 32 inputs): code = rne(x / scale), scale = absmax / 127, sums per 16 inputs.
struct QuantizedRows {
  const int8_t* codes = nullptr;  // [rows][k]
  const float* scales = nullptr;  // [rows][k/32]
  const int32_t* sums = nullptr;  // [rows][k/16]
};

// y[row][channel] for rows [row_begin, row_end) and panels [panel_begin, panel_end).
// Order for one output, g ascending over groups, acc exact in int32:
//   symmetric: y = fma(float(acc_g - zero_point * sum_g), scale_g * a_g, y)
//   affine:    y = fma(float(acc_g), scale_g * a_g, y);  y = fma(min_g, a_g * float(sum_g), y)
// with a_g the activation scale (scale_g * a_g rounded once to f32). Then y + bias, then y + out (accumulate), then y of
// the fine plane + y.
// Float weights: blocks of 64 inputs, each summed by fma ascending from 0 and added to y in ascending order.
struct MatmulArgs {
  const PackedWeight* weight = nullptr;
  const float* x = nullptr;  // float weights: [rows][x_stride]
  size_t x_stride = 0;
  QuantizedRows q;     // quantized weights
  QuantizedRows fine;  // a second plane of the activations, or null codes: its y is added last
  int row_begin = 0, row_end = 0;
  int panel_begin = 0, panel_end = 0;
  float* out = nullptr;  // [rows][out_stride], indexed by absolute row
  size_t out_stride = 0;
  const float* bias = nullptr;  // [n] or null
  bool accumulate = false;      // out += result (residual)
};

// ------------------------------------------------------------------------------------------------ paged KV cache
enum class KvFormat : uint8_t { f32, f16, bf16, s16 };  // s16: codes with a scale per (token, head), attention_codes.h

// One layer's cache. K page: [head_dim][16 tokens]; V page: [16 tokens][head_dim]. The pages of a block's heads follow each
// other, and so do the blocks of a span; `span_stride` bytes lead from a span to the next one, with room for the other
// layers' pages in between: see page_offset in attention.h.
struct KvView {
  KvFormat format = KvFormat::f16;
  int kv_heads = 0;
  int head_dim = 0;
  uint8_t* k = nullptr;
  uint8_t* v = nullptr;
  size_t span_stride = 0;  // of k, and of v
};

constexpr int kSpanBlocks = 16;    // KV blocks of a layer that lie together
constexpr int kPageTokens = 16;    // tokens of a KV block
constexpr int kBlockTokens = 64;   // attention block, absolute positions
constexpr int kSplitTokens = 512;  // attention split, absolute positions

// Consecutive rows of one sequence: row i has position `position + i`. Stores k and v (round to nearest even).
struct KvStoreArgs {
  KvView kv;
  const int32_t* block_table = nullptr;  // page index -> block id
  int position = 0;
  int rows = 0;
  const float* k = nullptr;  // [rows][stride], head h at h * head_dim
  const float* v = nullptr;
  size_t k_stride = 0, v_stride = 0;
};

// Attention of the q heads [kv_head_begin * group, kv_head_end * group) for `rows` consecutive positions.
// Per row, over splits s ascending, inside a split over 64-token blocks b ascending:
//   score_t = scale * sum_d fma(q_d, k_td) (d ascending, one accumulator); masked tokens (t > pos, t <= pos - window)
//   are left out; a block without a visible token is skipped.
//   m' = max(m, max_t score_t); c = exp(m - m') (first block: no rescale); l = l * c + sum_t p_t (t ascending... fixed
//   lane pattern, see attention.h); o_d = o_d * c then fma(p_t, v_td, o_d), t ascending.
// Splits merge in ascending order with the same rescaling rule. Row: o / l.
// `split_begin/end` restrict a call to some splits; with `partial` set it writes (m, l, o[head_dim]) per
// (row, q head, split) instead of the merged output, for attention_merge to finish: same bits either way.
struct AttentionArgs {
  KvView kv;
  const int32_t* block_table = nullptr;
  int position = 0;  // of row 0
  int rows = 0;
  int kv_head_begin = 0, kv_head_end = 0;
  int group = 1;  // q heads per kv head
  float scale = 1.f;
  int window = 0;            // 0 = unlimited
  const float* q = nullptr;  // [rows][q_stride], q head h at h * head_dim
  size_t q_stride = 0;
  float* out = nullptr;  // [rows][out_stride]
  size_t out_stride = 0;
  int split_begin = 0, split_end = 0;   // absolute split indices to visit
  const int32_t* next_pages = nullptr;  // block ids that the thread reads after this call, to be fetched towards its end
  int num_next_pages = 0;
  // [rows][q heads of the call][splits][head_dim + 2] or null. A call that fills a part of a larger buffer says the whole's
  // splits per (row, head) and floats per row, and points at its own first entry; 0: the buffer is this call's.
  float* partial = nullptr;
  int partial_splits = 0;
  size_t partial_row = 0;
  float* scratch = nullptr;  // attention_scratch_floats(rows, q heads of the call, head_dim) floats, per thread
};

// ------------------------------------------------------------------------------------------------------- the table
struct KernelTable {
  const char* isa = "ref";
  // matmul
  void (*matmul_quantized)(const MatmulArgs&) = nullptr;  // u2 .. u8 weights
  void (*matmul_float)(const MatmulArgs&) = nullptr;      // f32, f16, bf16 weights
  // n inputs of each row, a multiple of 32; codes of a row are `out_k` apart, its scales out_k / 32 and its sums out_k / 16.
  void (*quantize_rows)(const float* x, size_t x_stride, int rows, int n, int8_t* codes, float* scales, int32_t* sums,
                        size_t out_k) = nullptr;
  // row ops; `rows` rows of n floats with the given strides. In-place (out == x) is allowed.
  // rms_norm: 64 partial sums (lane i takes elements i, i+64, ...), added by a fixed tree; then x * (1/sqrt) * w.
  void (*rms_norm)(const float* x, size_t x_stride, const float* weight, float eps, int rows, int n, float* out,
                   size_t out_stride) = nullptr;
  // rope: heads of head_dim in each row, the first 2*half coordinates rotated: (x[i], x[i+half]);
  // cos/sin: [rows][half], already gathered for the rows' positions.
  void (*rope)(float* x, size_t x_stride, int rows, int heads, int head_dim, int half, const float* cos, const float* sin) = nullptr;
  void (*silu_mul)(const float* gate, const float* up, size_t stride, int rows, int n, float* out, size_t out_stride) = nullptr;
  void (*gelu_tanh_mul)(const float* gate, const float* up, size_t stride, int rows, int n, float* out, size_t out_stride) = nullptr;
  void (*add)(const float* x, const float* y, size_t stride, int rows, int n, float* out, size_t out_stride) = nullptr;  // x + y
  void (*exp)(const float* x, int n, float* out) = nullptr;  // the polynomial that attention and the activations use
  // attention
  void (*kv_store)(const KvStoreArgs&) = nullptr;
  void (*attention)(const AttentionArgs&) = nullptr;
  void (*attention_merge)(const float* partial, int rows, int heads, int splits, int head_dim, float* out, size_t out_stride) = nullptr;
};
size_t attention_scratch_floats(int rows, int heads, int head_dim);  // upper bound over all variants
constexpr int kAttentionTileRows = 16;                               // most rows the program passes per call

void register_ref(KernelTable&);  // fills every slot
// Each overrides what it has; called only when the CPU has the ISA (or a test forces it).
void register_ref_matmul(KernelTable&);
void register_ref_layers(KernelTable&);
void register_avx2_matmul(KernelTable&);
void register_avx2_layers(KernelTable&);
void register_avx512_matmul(KernelTable&);
void register_avx512_layers(KernelTable&);

// "ref", "avx2", "avx512_vnni" or "auto" (the best the CPU has). Throws std::runtime_error naming the missing
// feature when the CPU lacks the ISA that was asked for.
const KernelTable& kernel_table(const char* isa);
const char* const* available_isas();  // null-terminated, worst first

}  // namespace setpoint
