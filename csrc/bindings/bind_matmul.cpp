// Weights, embedding lookup and the matmul kernels one by one, for the lowering code, tests and benches.
#include "bindings/bindings.h"
#include "bindings/weight.h"
#include "kernels/kernels.h"
#include "quant/block_format.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

using RawArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IdVector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Range = std::pair<int, int>;
using Sources = std::vector<std::pair<std::string, RawArray>>;

std::vector<RawRows> raw_rows(const Sources& sources) {
  std::vector<RawRows> rows;
  for (const auto& [format, raw] : sources) rows.push_back({&block_format(format), raw.data(), raw.size(), int64_t(raw.shape(0))});
  return rows;
}

Weight pack(const Sources& sources, int64_t cols) {
  const std::vector<RawRows> rows = raw_rows(sources);
  nb::gil_scoped_release release;
  return Weight{PackedMatrix::pack(rows, cols)};
}

Weight pack_dequantized(const Sources& sources, int64_t cols) {
  const std::vector<RawRows> rows = raw_rows(sources);
  nb::gil_scoped_release release;
  return Weight{PackedMatrix::pack_dequantized(rows, cols)};
}

template <class T>
nb::ndarray<nb::numpy, T> owned_array(std::vector<T>&& values, std::vector<size_t> shape) {
  auto* storage = new std::vector<T>(std::move(values));
  nb::capsule owner(storage, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T>(storage->data(), shape.size(), shape.data(), owner);
}

struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

Quantized quantized_buffers(size_t rows, size_t k) {
  if (k == 0 || k % 32 != 0 || k > size_t(1) << 24 || rows > size_t(1) << 24)
    throw std::invalid_argument("activations need a positive multiple of 32 columns");
  return {std::vector<int8_t>(rows * k), std::vector<float>(rows * k / 32), std::vector<int32_t>(rows * k / 16)};
}

Quantized quantize(const KernelTable& kernels, const FloatMatrix& x) {
  const size_t rows = x.shape(0), k = x.shape(1);
  Quantized q = quantized_buffers(rows, k);
  kernels.quantize_rows(x.data(), k, int(rows), int(k), q.codes.data(), q.scales.data(), q.sums.data(), k);
  return q;
}

Range checked_range(const std::optional<Range>& range, int end) {
  if (!range) return {0, end};
  if (range->first < 0 || range->first > range->second || range->second > end) throw std::invalid_argument("range is out of bounds");
  return *range;
}

nb::tuple quantize_rows(const std::string& isa, FloatMatrix x, const std::optional<Range>& columns) {
  const KernelTable& kernels = kernel_table(isa.c_str());
  const size_t rows = x.shape(0), k = x.shape(1);
  Quantized q = quantized_buffers(rows, k);
  const Range range = checked_range(columns, int(k));
  if (range.first % 32 != 0 || range.second % 32 != 0) throw std::invalid_argument("columns: borders must be multiples of 32");
  const size_t first = size_t(range.first);
  kernels.quantize_rows(x.data() + first, k, int(rows), range.second - range.first, q.codes.data() + first, q.scales.data() + first / 32,
                        q.sums.data() + first / 16, k);
  return nb::make_tuple(owned_array(std::move(q.codes), {rows, k}), owned_array(std::move(q.scales), {rows, k / 32}),
                        owned_array(std::move(q.sums), {rows, k / 16}));
}

void run_matmul(const KernelTable& kernels, const MatmulArgs& args) {
  if (args.weight->is_quantized())
    kernels.matmul_quantized(args);
  else
    kernels.matmul_float(args);
}

nb::ndarray<nb::numpy, float> matmul(const std::string& isa, const Weight& weight, FloatMatrix x, std::optional<FloatVector> bias,
                                     std::optional<FloatMatrix> out, std::optional<Range> row_range, std::optional<Range> panel_range,
                                     std::optional<FloatMatrix> fine) {
  const KernelTable& kernels = kernel_table(isa.c_str());
  const PackedWeight& w = weight.matrix.weight();
  const size_t rows = x.shape(0), n = size_t(w.n);
  if (x.shape(1) != size_t(w.k) || rows > size_t(1) << 24) throw std::invalid_argument("x does not have the weight's k columns");
  if (bias && bias->shape(0) != n) throw std::invalid_argument("bias does not have the weight's n values");
  if (out && (out->shape(0) != rows || out->shape(1) != n)) throw std::invalid_argument("out is not [rows, n]");

  std::vector<float> result(rows * n);
  if (out) result.assign(out->data(), out->data() + rows * n);
  if (fine && (w.group == 0 || fine->shape(0) != rows || fine->shape(1) != size_t(w.k)))
    throw std::invalid_argument("fine is a second x for quantized weights");
  Quantized q, q_fine;
  MatmulArgs args;
  args.weight = &w;
  if (w.group == 0) {
    args.x = x.data();
    args.x_stride = size_t(w.k);
  } else {
    q = quantize(kernels, x);
    args.q = {q.codes.data(), q.scales.data(), q.sums.data()};
    if (fine) q_fine = quantize(kernels, *fine);
    if (fine) args.fine = {q_fine.codes.data(), q_fine.scales.data(), q_fine.sums.data()};
  }
  std::tie(args.row_begin, args.row_end) = checked_range(row_range, int(rows));
  std::tie(args.panel_begin, args.panel_end) = checked_range(panel_range, w.panels());
  args.out = result.data();
  args.out_stride = n;
  args.bias = bias ? bias->data() : nullptr;
  args.accumulate = out.has_value();
  {
    nb::gil_scoped_release release;
    run_matmul(kernels, args);
  }
  return owned_array(std::move(result), {rows, n});
}

nb::ndarray<nb::numpy, float> lookup_rows(const std::string& format, RawArray raw, int64_t cols, IdVector ids) {
  const BlockFormat& block = block_format(format);
  const size_t row_bytes = bytes_per_row(block, cols);
  if (raw.shape(1) != row_bytes) throw std::invalid_argument("raw rows do not have the bytes of " + std::to_string(cols) + " columns");
  std::vector<float> out(ids.size() * size_t(cols));
  dequantize_rows(block, raw.data(), raw.size(), int64_t(raw.shape(0)), cols, ids.data(), ids.size(), out.data());
  return owned_array(std::move(out), {ids.size(), size_t(cols)});
}

const char* codes_name(Codes codes) {
  constexpr const char* names[] = {"f32", "f16", "bf16", "u2", "u3", "u4", "u5", "u6", "u8"};
  return names[int(codes)];
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const char* const* name = available_isas(); *name != nullptr; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace

void bind_matmul(nb::module_& m) {
  nb::class_<Weight>(m, "Weight", "A weight matrix [n, k] repacked for the matmul kernels.")
      .def_static(
          "pack", [](const std::string& format, RawArray raw, int64_t cols) { return pack({{format, raw}}, cols); }, "format"_a, "raw"_a,
          "cols"_a, "Repack raw rows, uint8 [rows, bytes_per_row], without loss. Raises ValueError on a wrong size.")
      .def_static("pack_rows", &pack, "sources"_a, "cols"_a,
                  "Stack (format, raw) pairs row by row and repack them; all must become the same packed layout.")
      .def_static(
          "pack_dequantized", [](const std::string& format, RawArray raw, int64_t cols) { return pack_dequantized({{format, raw}}, cols); },
          "format"_a, "raw"_a, "cols"_a, "Repack raw rows as float32.")
      .def_static("pack_rows_dequantized", &pack_dequantized, "sources"_a, "cols"_a, "Stack (format, raw) pairs as float32.")
      .def_prop_ro(
          "n", [](const Weight& w) { return w.matrix.weight().n; }, "Output channels.")
      .def_prop_ro(
          "k", [](const Weight& w) { return w.matrix.weight().k; }, "Inputs.")
      .def_prop_ro(
          "codes", [](const Weight& w) { return codes_name(w.matrix.weight().codes); }, "f32, f16, bf16, u2, u3, u4, u5, u6 or u8.")
      .def_prop_ro("nbytes", [](const Weight& w) { return w.matrix.num_bytes(); }, "Bytes of the packed storage.");

  m.def(
      "packs_like", [](const std::string& a, const std::string& b) { return block_format(a).packs_like(block_format(b)); }, "a"_a, "b"_a,
      "Whether rows of the two formats can be stacked in one Weight.");
  m.def("dequantize_rows", &lookup_rows, "format"_a, "raw"_a, "cols"_a, "ids"_a,
        "Rows `ids` (int32) of raw uint8 [rows, bytes_per_row] as float32 [ids, cols].");
  m.def("kernels_matmul", &matmul, "isa"_a, "weight"_a, "x"_a, "bias"_a.none() = nb::none(), "out"_a.none() = nb::none(),
        "rows"_a = nb::none(), "panels"_a = nb::none(), "fine"_a = nb::none(),
        "x float32 [rows, k] times the weight: [rows, n], plus bias [n], plus out [rows, n]. Quantizes x where the weight is. "
        "`rows` and `panels` (of 16 channels) are (begin, end) ranges to compute; the rest stays as in out, or 0. "
        "`fine` is a second x of quantized weights, whose product is added last.");
  m.def("kernels_quantize_rows", &quantize_rows, "isa"_a, "x"_a, "columns"_a = nb::none(),
        "(codes int8 [rows, k], scales float32 [rows, k/32], sums int32 [rows, k/16]) of float32 [rows, k]. "
        "`columns` is a (begin, end) range to quantize; the rest stays 0.");
  m.def("available_isas", &isas, "What this CPU can run, worst first.");
}

}  // namespace setpoint
