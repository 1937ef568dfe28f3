// The sampler: one row of logits for each thread, with the settings that take different ways through it.
#include "bench/models.h"
#include "bench/random.h"
#include "bench/workload.h"
#include "kernels/kernels.h"
#include "kernels/sample.h"

#include <cstring>

namespace setpoint::bench {
namespace {

struct Settings {
  const char* name;
  float temperature, top_p, min_p;
  int top_k, num_logprobs;
};

constexpr Settings kSettings[] = {
    {"greedy", 0.f, 1.f, 0.f, 0, -1},   {"plain", 0.8f, 1.f, 0.f, 0, -1},   {"top_k", 0.8f, 1.f, 0.f, 40, -1},
    {"top_p", 0.8f, 0.95f, 0.f, 0, -1}, {"min_p", 0.8f, 1.f, 0.05f, 0, -1}, {"top_k_p", 0.8f, 0.95f, 0.f, 40, -1},
    {"logprobs", 0.f, 1.f, 0.f, 0, 5},
};

class SampleWorkload : public Workload {
 public:
  SampleWorkload(const Settings& settings, int vocab, const char* isa, int threads) : settings_(settings), vocab_(vocab) {
    for (int thread = 0; thread < threads; ++thread) {
      scratch_.emplace_back(vocab, isa);
      rows_.push_back(logits(thread));
    }
    results_.resize(size_t(threads));
  }

  Work work() const override { return {0, 4. * vocab_ * double(rows_.size()), Peak::fp32, size_t(vocab_) * 4}; }
  void prepare(int, int) override {}
  void run(int, int thread) override { sample(rows_[size_t(thread)], scratch_[size_t(thread)], thread, results_[size_t(thread)]); }

  bool matches_reference() override {
    SampleScratch scratch(vocab_, "ref");
    for (size_t i = 0; i < rows_.size(); ++i) {
      std::vector<float> row = logits(int(i));  // the sampler may have written to the other
      SampleResult expected;
      sample(row, scratch, int(i), expected);
      const SampleResult& got = results_[i];
      if (got.token != expected.token || got.finite != expected.finite || got.num_top != expected.num_top) return false;
      if (settings_.num_logprobs < 0) continue;
      const size_t top = size_t(got.num_top);
      if (std::memcmp(&got.logprob, &expected.logprob, sizeof(float)) != 0 || got.rank != expected.rank ||
          std::memcmp(got.top_ids, expected.top_ids, top * sizeof(int32_t)) != 0 ||
          std::memcmp(got.top_logprobs, expected.top_logprobs, top * sizeof(float)) != 0)
        return false;
    }
    return true;
  }

 private:
  // As models' logits are: a broad bulk and a few likely tokens far above it.
  std::vector<float> logits(int seed) const {
    std::vector<float> row(static_cast<size_t>(vocab_));
    Random random(uint64_t(seed) + 100);
    for (float& value : row) value = 3.f * (random.symmetric() + random.symmetric() + random.symmetric());
    for (int i = 0; i < 20; ++i) row[size_t(random.below(vocab_))] = 14.f + 3.f * random.symmetric();
    return row;
  }

  void sample(std::vector<float>& row, SampleScratch& scratch, int seed, SampleResult& result) const {
    SampleArgs args;
    args.logits = row.data();
    args.vocab = vocab_;
    args.temperature = settings_.temperature;
    args.top_p = settings_.top_p;
    args.min_p = settings_.min_p;
    args.top_k = settings_.top_k;
    args.num_logprobs = settings_.num_logprobs;
    args.seed = uint64_t(seed);
    sample_row(args, scratch, result);
  }

  const Settings& settings_;
  int vocab_;
  std::vector<SampleScratch> scratch_;
  std::vector<std::vector<float>> rows_;
  std::vector<SampleResult> results_;
};

}  // namespace

void add_sample_cases(Cases& cases) {
  for (const Settings& settings : kSettings)
    for (const ModelShape& model : kModels) {
      if (model.hidden == 1536) continue;  // the vocabulary of its smaller sibling
      for (const char* const* isa = available_isas(); *isa != nullptr; ++isa)
        cases.push_back({std::string("sample/") + settings.name + "/" + model.name + "/" + *isa + "/warm",
                         is_best_isa(*isa) && (model.hidden == 576 || (model.hidden == 640 && settings.top_k == 40)),
                         [&settings, vocab = model.vocab, isa = *isa](int threads) -> std::unique_ptr<Workload> {
                           return std::make_unique<SampleWorkload>(settings, vocab, isa, threads);
                         }});
    }
}

}  // namespace setpoint::bench
