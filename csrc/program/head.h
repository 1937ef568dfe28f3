// The end of a step: the wanted rows through the final norm, the output matrix
// and the sampler.
#pragma once
#include <vector>

#include "kernels/sample.h"
#include "program/matmul_stage.h"

namespace setpoint {

// What a row gave; runtime/cpu/arrays.py reads records of this layout.
struct RowOutput {
  int32_t token;
  float logprob;
  int32_t rank;
  int32_t finite;  // 0: the logits are not finite, the rest is void
  int32_t num_top;
  int32_t top_ids[kMaxLogprobs];
  float top_logprobs[kMaxLogprobs];
};
static_assert(sizeof(RowOutput) == 180);

class HeadStage : public Stage {
 public:
  struct Norm {
    std::vector<float> weight;
    float eps = 0.f;
  };
  // `weight` is [vocab, hidden]; logits are computed for a chunk of rows at a
  // time, to bound their memory. Row r of slot `in` is wanted row r when
  // `selected`, else the step's token r.
  HeadStage(int in, bool selected, Norm norm, PackedWeight weight, const Limits& limits, int threads, const char* isa);

  StageKind kind() const override { return StageKind::head; }
  void prepare(const Step& step) override;
  void run(const Step& step, int thread) override;

  const RowOutput* outputs() const { return outputs_.data(); }

 private:
  void gather(const Step& step, int chunk, int thread);
  void multiply(const Step& step, int chunk, int thread);
  void sample(const Step& step, int row, int thread);
  int chunk_end(const Step& step, int chunk) const;

  int in_;
  bool selected_;
  Norm norm_;
  PackedWeight weight_;
  int chunk_rows_;
  FloatRows hidden_, logits_;  // [chunk_rows]
  // The hidden state as a sum of two 8-bit planes: what the first rounds away,
  // the second holds. Logits decide between tokens by differences that one
  // plane would blur.
  QuantizedActivations coarse_, fine_;
  std::vector<SampleScratch> scratch_;     // per thread
  std::vector<RowOutput> outputs_;         // [max_rows]
  std::vector<MatmulSchedule> schedules_;  // per chunk
};

}  // namespace setpoint
