// Matmul of every format on the models' shapes, shared out over the threads as a step does it.
#include "bench/models.h"
#include "bench/random.h"
#include "bench/weights.h"
#include "bench/workload.h"
#include "program/matmul_stage.h"
#include "program/workspace.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace setpoint::bench {
namespace {

constexpr const char* kFormats[] = {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q5_K", "Q3_K", "Q2_K", "F16", "BF16", "F32"};
constexpr int kRows[] = {1, 2, 3, 4, 8, 16, 32, 96, 256, 512};
constexpr double kReferenceMacs = 8e6;  // compared with the reference in each case: it is slow

struct Shape {
  const char* name;
  int n, k;
};

std::vector<Shape> shapes_of(const ModelShape& m) {
  return {{"qkv", (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden},
          {"o", m.hidden, m.heads * m.head_dim},
          {"gate_up", 2 * m.intermediate, m.hidden},
          {"down", m.hidden, m.intermediate},
          {"head", m.vocab, m.hidden}};
}

class MatmulWorkload : public Workload {
 public:
  MatmulWorkload(std::shared_ptr<Weights> weights, int rows, const char* isa, size_t cold_bytes, int threads)
      : weights_(std::move(weights)),
        kernels_(kernel_table(isa)),
        rows_(rows),
        threads_(threads),
        cold_(cold_bytes > 0),
        x_(rows, weights_->view().k),
        out_(rows, weights_->view().n) {
    if (cold_) weights_->copy_until(cold_bytes);
    const PackedWeight& w = weights_->view();
    Random random(7);
    for (int row = 0; row < rows; ++row) random.fill_activations(x_.row(row), size_t(w.k));
    if (!w.is_quantized()) return;
    q_ = QuantizedActivations(rows, w.k);
    q_.quantize(kernel_table("ref"), x_.values.data(), x_.stride, 0, rows, 0, w.k);
  }

  Work work() const override {
    const PackedWeight& w = weights_->view();
    const double activations = double(rows_) * (w.is_quantized() ? w.k * 1.25 : w.k * 4.) + double(rows_) * w.n * 4.;
    const double weight_bytes = double(weights_->bytes());
    return {2. * rows_ * w.n * w.k, weight_bytes + activations, w.is_quantized() ? Peak::int8 : Peak::fp32,
            cold_ ? 0 : size_t(weight_bytes + activations) / size_t(threads_)};
  }

  void prepare(int repetitions, int threads) override {
    if (repetitions > capacity_) schedules_.reset(new MatmulSchedule[size_t(capacity_ = repetitions)]);
    for (int i = 0; i < repetitions; ++i) schedules_[size_t(i)].reset(rows_, weights_->view().panels(), threads);
    first_copy_ += prepared_;  // copies go on where the last repetitions ended
    prepared_ = size_t(repetitions);
  }

  void run(int index, int thread) override {
    MatmulArgs args = arguments();
    args.weight = cold_ ? &weights_->copy(first_copy_ + size_t(index)) : &weights_->view();
    schedules_[size_t(index)].run(thread, threads_, [&](int row_begin, int row_end, int panel_begin, int panel_end) {
      args.row_begin = row_begin;
      args.row_end = row_end;
      args.panel_begin = panel_begin;
      args.panel_end = panel_end;
      run_matmul(kernels_, args);
    });
  }

  bool matches_reference() override {
    const PackedWeight& w = weights_->view();
    FloatRows expected(rows_, w.n);
    MatmulArgs args = arguments();
    args.weight = &w;
    args.out = expected.values.data();
    Random random(11);
    const int tile_rows = std::min(rows_, 4);
    const int tiles = std::clamp(int(kReferenceMacs / (16. * tile_rows * w.k)), 3, 64);
    for (int tile = 0; tile < tiles; ++tile) {  // the corners, where tiles are cut off, then anywhere
      args.row_begin = tile == 0 ? 0 : tile == 1 ? rows_ - tile_rows : random.below(rows_ - tile_rows + 1);
      args.panel_begin = tile == 0 ? 0 : tile == 1 ? w.panels() - 1 : random.below(w.panels());
      args.row_end = args.row_begin + tile_rows;
      args.panel_end = args.panel_begin + 1;
      run_matmul(kernel_table("ref"), args);
      const int channel = args.panel_begin * 16, channels = std::min(16, w.n - channel);
      for (int row = args.row_begin; row < args.row_end; ++row)
        if (std::memcmp(expected.row(row) + channel, out_.row(row) + channel, size_t(channels) * sizeof(float)) != 0) return false;
    }
    return true;
  }

 private:
  MatmulArgs arguments() {
    MatmulArgs args;
    args.x = x_.values.data();
    args.x_stride = x_.stride;
    args.q = q_.view();
    args.out = out_.values.data();
    args.out_stride = out_.stride;
    return args;
  }

  std::shared_ptr<Weights> weights_;
  const KernelTable& kernels_;
  int rows_, threads_;
  bool cold_;
  FloatRows x_, out_;
  QuantizedActivations q_;
  std::unique_ptr<MatmulSchedule[]> schedules_;  // one a repetition, so that one barrier between them is enough
  int capacity_ = 0;
  size_t first_copy_ = 0, prepared_ = 0;
};

bool fits(const BlockFormat& format, int cols) { return cols % format.block_elements == 0; }

// Formats, shapes and sizes that tell most, when time is short: the headline format everywhere, others where they differ.
bool is_standard(const BlockFormat& format, std::string_view model, std::string_view shape, int rows, bool cold) {
  const std::string_view name = format.name;
  const bool wide = rows == 1 || rows == 8 || rows == 32 || rows == 512;
  if (!wide || (!cold && rows > 8)) return false;
  if (name == "Q4_0") return model == "smollm2-135m" ? shape != "qkv" : model == "qwen2.5-1.5b" && shape == "gate_up";
  if (name == "Q4_1" || name == "Q8_0") return cold && model == "smollm2-135m" && shape == "gate_up";
  if (name == "Q4_K" || name == "Q6_K") return cold && model == "qwen2.5-1.5b" && shape == "down";
  return name == "F16" && cold && model == "smollm2-135m" && shape == "down";
}

}  // namespace

void add_matmul_cases(Cases& cases, size_t cold_bytes) {
  for (const ModelShape& model : kModels)
    for (const char* name : kFormats)
      for (const Shape& shape : shapes_of(model)) {
        const BlockFormat* format = &block_format(name);
        if (!fits(*format, shape.k)) continue;
        for (int rows : kRows)
          for (const char* const* isa = available_isas(); *isa != nullptr; ++isa)
            for (bool cold : {true, false})
              cases.push_back({std::string("matmul/") + name + "/" + model.name + "/" + shape.name + "/m" + std::to_string(rows) + "/" +
                                   *isa + (cold ? "/cold" : "/warm"),
                               is_best_isa(*isa) && is_standard(*format, model.name, shape.name, rows, cold),
                               [=, isa = *isa](int threads) -> std::unique_ptr<Workload> {
                                 return std::make_unique<MatmulWorkload>(weights_of(*format, shape.n, shape.k), rows, isa,
                                                                         cold ? cold_bytes : 0, threads);
                               }});
      }
}

}  // namespace setpoint::bench
