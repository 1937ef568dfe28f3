// The end of a step: the wanted rows through the final norm, the output matrix
// and the sampler.
#pragma once
#include <memory>
#include <vector>

#include "kernels/sample.h"
#include "program/greedy_head.h"

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
  // The rest of it for masks that come late: by one thread, before this stage runs.
  void prepare_masks(const Step& step);
  void run(const Step& step, int thread) override;
  std::span<const uint8_t> first_reads(const Step& step, int thread) const override;

  const RowOutput* outputs() const { return outputs_.data(); }

  // Greedy rows read no more of the matrix than their token takes (GreedyHead). It wants to see typical inputs first:
  // while collecting, a step keeps its rows' and computes no logits.
  bool can_shorten() const { return Shortlist::suits(weight_); }
  void collect(bool on) { collecting_ = on; }
  void shorten(const KernelTable& kernels, ThreadPool& pool);
  // What it derives from the matrix lies in memory of its own, or where it is told to put it: 0 bytes where it does not
  // help. What lies there already is taken up instead.
  size_t shortlist_bytes() const { return Shortlist::suits_shape(weight_) ? Shortlist::memory_bytes(weight_) : 0; }
  void put_shortlist(uint8_t* memory) { shortlist_memory_ = memory; }
  void take_up_shortlist(int threads);
  double greedy_retried_part() const { return greedy_ ? greedy_->retried_part() : 0.; }
  size_t greedy_bytes() const { return greedy_ ? greedy_->num_bytes() : 0; }

 private:
  HeadRows rows_of(const Step& step, int chunk) {
    const int first = chunk * chunk_rows_;
    return {chunk_end(step, chunk) - first, weight_, coarse_, fine_, logits_, step.batch.inputs(), first};
  }
  bool wants_best_alone(const Step& step, int chunk) const { return !is_sparse(chunk) && wants_best_of_all(step, chunk); }
  bool wants_best_of_all(const Step& step, int chunk) const;
  void note_allowed(const Step& step, int chunk);
  bool is_sparse(int chunk) const { return sparse_[static_cast<size_t>(chunk)] != 0; }
  bool is_allowed(int chunk, int panel) const {
    return (allowed_[static_cast<size_t>(chunk) * mask_words_ + static_cast<size_t>(panel / 2)] >> panel % 2 * 16 & 0xffff) != 0;
  }
  void multiply_allowed(const HeadRows& rows, const KernelTable& kernels, MatmulArgs args, int chunk);
  void multiply_all(const HeadRows& rows, const KernelTable& kernels, const MatmulArgs& args) const;
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
  // Rows whose masks allow few tokens multiply no more of the matrix than those.
  size_t mask_words_;
  std::vector<uint32_t> allowed_;  // [chunks][mask words] by any row of the chunk
  std::vector<char> sparse_;       // per chunk
  std::unique_ptr<GreedyHead> greedy_;
  bool collecting_ = false;
  std::vector<float> collected_;  // [rows][hidden]
  uint8_t* shortlist_memory_ = nullptr;
  MappedArray<uint8_t> own_shortlist_memory_;
};

}  // namespace setpoint
