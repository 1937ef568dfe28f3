// The row operations and attention one by one, on numpy arrays: the surface of tests/kernels. Shapes are checked here.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "kernels/attention_codes.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

namespace nb = nanobind;

namespace setpoint {
namespace {

using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Floats4 = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using CacheBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BlockTable = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Array = nb::ndarray<nb::numpy, float>;

void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

Array to_numpy(std::vector<float> values, std::initializer_list<size_t> shape) {
  auto* owned = new std::vector<float>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
  return Array(owned->data(), shape, owner);
}

KvFormat format_of(const std::string& name) {
  if (name == "f32") return KvFormat::f32;
  if (name == "f16") return KvFormat::f16;
  if (name == "bf16") return KvFormat::bf16;
  if (name == "s16") return KvFormat::s16;
  throw std::invalid_argument("KV format is one of f32, f16, bf16, s16");
}

Array rms_norm(const std::string& isa, Floats2 x, Floats1 weight, float eps) {
  const size_t rows = x.shape(0), n = x.shape(1);
  check(weight.shape(0) == n, "weight must have one element per column");
  std::vector<float> out(rows * n);
  kernel_table(isa.c_str()).rms_norm(x.data(), n, weight.data(), eps, static_cast<int>(rows), static_cast<int>(n), out.data(), n);
  return to_numpy(std::move(out), {rows, n});
}

Array rope(const std::string& isa, Floats3 x, Floats2 cos, Floats2 sin) {
  const size_t rows = x.shape(0), heads = x.shape(1), head_dim = x.shape(2), half = cos.shape(1);
  check(cos.shape(0) == rows && sin.shape(0) == rows && sin.shape(1) == half && 2 * half <= head_dim, "cos, sin: [rows][half]");
  std::vector<float> out(x.data(), x.data() + x.size());
  kernel_table(isa.c_str())
      .rope(out.data(), heads * head_dim, static_cast<int>(rows), static_cast<int>(heads), static_cast<int>(head_dim),
            static_cast<int>(half), cos.data(), sin.data());
  return to_numpy(std::move(out), {rows, heads, head_dim});
}

using PairKernel = void (*KernelTable::*)(const float*, const float*, size_t, int, int, float*, size_t);

template <PairKernel kernel>
Array activation_mul(const std::string& isa, Floats2 gate, Floats2 up) {
  const size_t rows = gate.shape(0), n = gate.shape(1);
  check(up.shape(0) == rows && up.shape(1) == n, "gate and up must have one shape");
  std::vector<float> out(rows * n);
  (kernel_table(isa.c_str()).*kernel)(gate.data(), up.data(), n, static_cast<int>(rows), static_cast<int>(n), out.data(), n);
  return to_numpy(std::move(out), {rows, n});
}

Array add(const std::string& isa, Floats2 x, Floats2 y) {
  const size_t rows = x.shape(0), n = x.shape(1);
  check(y.shape(0) == rows && y.shape(1) == n, "both terms must have one shape");
  std::vector<float> out(y.size());
  kernel_table(isa.c_str()).add(x.data(), y.data(), n, static_cast<int>(rows), static_cast<int>(n), out.data(), n);
  return to_numpy(std::move(out), {rows, n});
}

Array exp_values(const std::string& isa, Floats1 x) {
  std::vector<float> out(x.shape(0));
  kernel_table(isa.c_str()).exp(x.data(), static_cast<int>(x.shape(0)), out.data());
  return to_numpy(std::move(out), {x.shape(0)});
}

KvView view_of(KvFormat format, CacheBytes k, CacheBytes v, int kv_heads, int head_dim, BlockTable table, int tokens) {
  check(kv_heads > 0 && head_dim > 0 && tokens >= 0, "kv_heads, head_dim and the token count must be positive");
  check(format != KvFormat::s16 || (head_dim % 2 == 0 && head_dim <= kMostCodeHeadDim), "s16 needs an even, moderate head_dim");
  const size_t blocks = std::min(k.shape(0), v.shape(0)) / (kv_heads * kv_page_bytes(format, head_dim));
  check(static_cast<size_t>(tokens) <= table.shape(0) * kPageTokens, "the block table is too short");
  for (size_t i = 0; i < table.shape(0); ++i)
    check(table(i) >= -1 && table(i) < static_cast<int64_t>(blocks), "a block id is outside the cache");
  return {format, kv_heads, head_dim, k.data(), v.data(), kv_span_bytes(format, kv_heads, head_dim)};
}

void kv_store(const std::string& isa, const std::string& format, CacheBytes k_cache, CacheBytes v_cache, int kv_heads,
              BlockTable block_table, int position, Floats2 k, Floats2 v) {
  const size_t rows = k.shape(0), width = k.shape(1);
  check(v.shape(0) == rows && v.shape(1) == width && kv_heads > 0 && width % kv_heads == 0, "k, v: [rows][kv_heads * head_dim]");
  KvStoreArgs a;
  a.kv = view_of(format_of(format), k_cache, v_cache, kv_heads, static_cast<int>(width) / kv_heads, block_table,
                 position + static_cast<int>(rows));
  a.block_table = block_table.data();
  a.position = position;
  a.rows = static_cast<int>(rows);
  a.k = k.data();
  a.v = v.data();
  a.k_stride = a.v_stride = width;
  kernel_table(isa.c_str()).kv_store(a);
}

// q: [rows][heads * head_dim]. Returns [rows][heads * head_dim], or with `partial` set [rows][heads][splits][head_dim + 2].
// Head range 0, 0 means all heads; q, and a result that is not partial, always have all of them (0 where not computed).
// split_end 0 means: up to the last row's split. With partial_splits set, the result has that many splits; the call fills its
// own, at their absolute index, and leaves the others 0.
Array attention(const std::string& isa, const std::string& format, CacheBytes k_cache, CacheBytes v_cache, int kv_heads, int head_dim,
                BlockTable block_table, int position, Floats2 q, float scale, int window, int head_begin, int head_end, int split_begin,
                int split_end, bool partial, int partial_splits) {
  const size_t rows = q.shape(0), width = q.shape(1);
  const int last = position + static_cast<int>(rows);
  AttentionArgs a;
  a.kv = view_of(format_of(format), k_cache, v_cache, kv_heads, head_dim, block_table, last);
  check(position >= 0 && window >= 0 && rows > 0 && width % (static_cast<size_t>(kv_heads) * head_dim) == 0, "q: [rows][heads * head_dim]");
  a.block_table = block_table.data();
  a.position = position;
  a.rows = static_cast<int>(rows);
  a.kv_head_begin = head_begin;
  a.kv_head_end = head_end > 0 ? head_end : kv_heads;
  check(head_begin >= 0 && head_begin < a.kv_head_end && a.kv_head_end <= kv_heads, "head range");
  a.group = static_cast<int>(width / (static_cast<size_t>(kv_heads) * head_dim));
  a.scale = scale;
  a.window = window;
  a.q = q.data();
  a.q_stride = a.out_stride = width;
  a.split_begin = split_begin;
  a.split_end = split_end > 0 ? split_end : (last + kSplitTokens - 1) / kSplitTokens;
  check(split_begin >= 0 && split_begin < a.split_end && static_cast<int64_t>(a.split_end) <= last / kSplitTokens + 1, "split range");
  check(partial_splits == 0 || partial_splits >= a.split_end, "partial_splits must cover split_end");
  a.partial_splits = partial_splits;
  const size_t heads = heads_of(a), splits = partial_splits > 0 ? partial_splits : a.split_end - a.split_begin;
  const size_t entry = head_dim + 2, first = partial_splits > 0 ? split_begin * entry : 0;
  std::vector<float> out(partial ? rows * heads * splits * entry : rows * width);
  std::vector<float> scratch(attention_scratch_floats(a.rows, heads_of(a), head_dim));
  a.scratch = scratch.data();
  if (partial)
    a.partial = out.data() + first;
  else
    a.out = out.data();
  kernel_table(isa.c_str()).attention(a);
  if (!partial) return to_numpy(std::move(out), {rows, width});
  return to_numpy(std::move(out), {rows, heads, splits, entry});
}

// partial: [rows][heads][splits][head_dim + 2] -> [rows][heads * head_dim].
Array attention_merge(const std::string& isa, Floats4 partial) {
  const size_t rows = partial.shape(0), heads = partial.shape(1), splits = partial.shape(2);
  check(partial.shape(3) > 2, "partial: [rows][heads][splits][head_dim + 2]");
  const size_t head_dim = partial.shape(3) - 2, width = heads * head_dim;
  std::vector<float> out(rows * width);
  kernel_table(isa.c_str())
      .attention_merge(partial.data(), static_cast<int>(rows), static_cast<int>(heads), static_cast<int>(splits),
                       static_cast<int>(head_dim), out.data(), width);
  return to_numpy(std::move(out), {rows, width});
}

}  // namespace

void bind_layers(nb::module_& m) {
  using namespace nb::literals;
  m.def("kernels_rms_norm", rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  m.def("kernels_rope", rope, "isa"_a, "x"_a, "cos"_a, "sin"_a);
  m.def("kernels_silu_mul", activation_mul<&KernelTable::silu_mul>, "isa"_a, "gate"_a, "up"_a);
  m.def("kernels_gelu_tanh_mul", activation_mul<&KernelTable::gelu_tanh_mul>, "isa"_a, "gate"_a, "up"_a);
  m.def("kernels_add", add, "isa"_a, "x"_a, "y"_a);
  m.def("kernels_exp", exp_values, "isa"_a, "x"_a);
  m.def("kernels_kv_store", kv_store, "isa"_a, "format"_a, "k_cache"_a, "v_cache"_a, "kv_heads"_a, "block_table"_a, "position"_a, "k"_a,
        "v"_a);
  m.def("kernels_attention", attention, "isa"_a, "format"_a, "k_cache"_a, "v_cache"_a, "kv_heads"_a, "head_dim"_a, "block_table"_a,
        "position"_a, "q"_a, "scale"_a, "window"_a = 0, "head_begin"_a = 0, "head_end"_a = 0, "split_begin"_a = 0, "split_end"_a = 0,
        "partial"_a = false, "partial_splits"_a = 0);
  m.def("kernels_attention_merge", attention_merge, "isa"_a, "partial"_a);
}

}  // namespace setpoint
