// The row operations between matmuls, on activations that are where a step has just left them: in the caches.
#include "bench/models.h"
#include "bench/random.h"
#include "bench/workload.h"
#include "kernels/kernels.h"

#include <cmath>
#include <cstring>

namespace setpoint::bench {
namespace {

constexpr int kRows[] = {1, 32, 512};

struct Buffers {
  Buffers(int rows, int n)
      : n(n),
        x(size_t(rows) * n),
        y(size_t(rows) * n),
        out(size_t(rows) * n),
        cos(size_t(rows) * n),
        sin(size_t(rows) * n),
        codes(size_t(rows) * n),
        scales(size_t(rows) * n / 32),
        sums(size_t(rows) * n / 16) {
    Random random(3);
    random.fill_activations(x.data(), x.size());
    random.fill_activations(y.data(), y.size());
    for (size_t i = 0; i < cos.size(); ++i) {
      const float angle = 3.f * random.symmetric();
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
  }
  bool same_results(const Buffers& other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * sizeof(float)) == 0 && codes == other.codes &&
           std::memcmp(scales.data(), other.scales.data(), scales.size() * sizeof(float)) == 0 && sums == other.sums;
  }
  float* row(std::vector<float>& values, int row) const { return values.data() + size_t(row) * size_t(n); }

  int n;
  std::vector<float> x, y, out, cos, sin;
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

struct Operation {
  const char* name;
  double bytes;  // read and written for each of the n values of a row
  int head_dim;  // what n must be a multiple of
  void (*run)(const KernelTable& kernels, Buffers& b, int row, int rows);
};

// clang-format off
constexpr int kRopeDim = 64;
constexpr Operation kOperations[] = {
    {"quantize_rows", 4 + 1 + 0.375, 32, [](const KernelTable& k, Buffers& b, int row, int rows) {
       const size_t at = size_t(row) * size_t(b.n);
       k.quantize_rows(b.row(b.x, row), size_t(b.n), rows, b.n, b.codes.data() + at, b.scales.data() + at / 32, b.sums.data() + at / 16, size_t(b.n)); }},
    {"rms_norm", 8, 1, [](const KernelTable& k, Buffers& b, int row, int rows) {
       k.rms_norm(b.row(b.x, row), size_t(b.n), b.y.data(), 1e-5f, rows, b.n, b.row(b.out, row), size_t(b.n)); }},
    {"silu_mul", 12, 1, [](const KernelTable& k, Buffers& b, int row, int rows) {
       k.silu_mul(b.row(b.x, row), b.row(b.y, row), size_t(b.n), rows, b.n, b.row(b.out, row), size_t(b.n)); }},
    {"gelu_tanh_mul", 12, 1, [](const KernelTable& k, Buffers& b, int row, int rows) {
       k.gelu_tanh_mul(b.row(b.x, row), b.row(b.y, row), size_t(b.n), rows, b.n, b.row(b.out, row), size_t(b.n)); }},
    {"add", 12, 1, [](const KernelTable& k, Buffers& b, int row, int rows) {
       k.add(b.row(b.x, row), b.row(b.y, row), size_t(b.n), rows, b.n, b.row(b.out, row), size_t(b.n)); }},
    {"rope", 8, kRopeDim, [](const KernelTable& k, Buffers& b, int row, int rows) {
       const size_t half = size_t(row) * kRopeDim / 2;
       k.rope(b.row(b.out, row), size_t(b.n), rows, b.n / kRopeDim, kRopeDim, kRopeDim / 2, b.cos.data() + half, b.sin.data() + half); }},
};
// clang-format on

class RowWorkload : public Workload {
 public:
  RowWorkload(const Operation& operation, int rows, int n, const char* isa, int threads)
      : operation_(operation), kernels_(kernel_table(isa)), rows_(rows), threads_(threads), buffers_(rows, n) {}

  Work work() const override {
    const double bytes = operation_.bytes * rows_ * buffers_.n;
    return {0, bytes, Peak::fp32, size_t(bytes) / size_t(std::min(threads_, rows_))};
  }
  void prepare(int, int threads) override {
    threads_ = threads;
    buffers_.out = buffers_.x;  // for what works in place
  }
  void run(int, int thread) override {
    const int begin = rows_ * thread / threads_, end = rows_ * (thread + 1) / threads_;
    if (begin < end) operation_.run(kernels_, buffers_, begin, end - begin);
  }
  bool matches_reference() override {
    Buffers expected(rows_, buffers_.n);
    expected.out = expected.x;
    operation_.run(kernel_table("ref"), expected, 0, rows_);
    return buffers_.same_results(expected);
  }

 private:
  const Operation& operation_;
  const KernelTable& kernels_;
  int rows_, threads_;
  Buffers buffers_;
};

}  // namespace

void add_row_cases(Cases& cases) {
  for (const Operation& operation : kOperations)
    for (const ModelShape& model : kModels)
      for (const auto& [place, n] : {std::pair{"hidden", model.hidden}, std::pair{"intermediate", model.intermediate}}) {
        if (n % operation.head_dim != 0) continue;
        for (int rows : kRows)
          for (const char* const* isa = available_isas(); *isa != nullptr; ++isa)
            cases.push_back(
                {std::string(operation.name) + "/" + model.name + "/" + place + "/m" + std::to_string(rows) + "/" + *isa + "/warm",
                 is_best_isa(*isa) && model.hidden == 576 && rows != 32 && (n == model.hidden) != (operation.bytes == 12),
                 [&operation, rows, n = n, isa = *isa](int threads) -> std::unique_ptr<Workload> {
                   return std::make_unique<RowWorkload>(operation, rows, n, isa, threads);
                 }});
      }
}

}  // namespace setpoint::bench
