// A lowered model: stages over slots, weights and a paged KV cache; one call
// runs a whole step.
//
// Built op by op, then frozen by head(). A step allocates nothing and touches
// no Python.
#pragma once
#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "program/head.h"
#include "program/matmul_stage.h"
#include "program/read_ahead.h"
#include "program/row_ops.h"

namespace setpoint {

// Every building method throws std::invalid_argument when shapes disagree.
// Slots, layers, groups and rope tables are numbered in order of creation.
// Weights and embedding tables are borrowed: they must outlive the program.
class Program {
 public:
  struct Options {
    std::string isa = "auto";
    int num_threads = 1;
    KvFormat kv_format = KvFormat::f16;
    Limits limits;
  };
  explicit Program(const Options& options);

  int slot(int width);
  int kv_group(int num_blocks, int window) { return kv_.add_group(num_blocks, window); }
  int kv_layer(int group, int kv_heads, int head_dim) { return kv_.add_layer(group, kv_heads, head_dim); }
  int rope_table(std::vector<float> inv_freq, float factor);

  // `table` holds at least `vocab` rows as wide as the slot.
  void embed(const BlockFormat& format, const uint8_t* table, size_t size, float scale, int out);
  void rms_norm(int in, std::vector<float> weight, float eps, int out);
  void head_norm(int slot, std::vector<float> weight, float eps);
  void rope(int slot, int head_dim, int table);
  void matmul(const PackedWeight& weight, int in, int out, std::vector<float> bias, bool accumulate);
  void kv_store(int layer, int k, int v);
  void attention(int layer, float scale, int q, int out);
  void gated_multiply(Activation act, int gate, int up);
  void add(int a, int b, int out);
  // From here on only the rows whose logits are wanted are computed; `in` is
  // copied to `out` for them. Follows the last attention: what the other tokens
  // would still compute, nobody reads.
  void select_rows(int in, int out);
  void head(int in, std::vector<float> norm_weight, float eps, const PackedWeight& weight);

  // Runs `tokens` as one sequence from position 0, over whatever the cache holds, to learn how the head's inputs lie;
  // then greedy rows cost less, and give the same tokens. Returns the bytes it took: 0 where it would not help.
  size_t shorten_head(std::span<const int32_t> tokens);
  // Where it puts what it learns, instead of in memory of its own; 0 bytes where it will not help.
  size_t shortlist_bytes() const { return head_ == nullptr ? 0 : head_->shortlist_bytes(); }
  void put_shortlist(uint8_t* memory);
  // Takes up what lies there already, from a run before; returns its bytes, 0 for none.
  size_t take_up_shortlist();

  double head_retried_part() const { return head_ == nullptr ? 0. : head_->greedy_retried_part(); }

  // One step. Throws std::invalid_argument on bad inputs before anything has
  // run, std::runtime_error while another thread is in a step. The rows' outputs
  // stay valid until the next step.
  void step(const StepInputs& inputs);
  void check(const StepInputs& inputs);  // throws what step would throw, runs nothing
  const RowOutput* outputs() const;

  const Limits& limits() const { return limits_; }
  const char* isa() const { return kernels_.isa; }
  int num_threads() const { return pool_.size(); }
  int last_team() const { return pool_.team(); }
  size_t kv_bytes() const { return kv_.bytes(); }
  void commit_kv() { kv_.begin_committing(); }  // before the first step, which finds its memory ready then
  // What a KV block of a group holds, see KvCache; throws std::runtime_error while another thread is in a step.
  size_t kv_block_bytes(int group) const { return kv_.block_bytes(group); }
  void read_kv(int group, int block, uint8_t* out, size_t size);
  void write_kv(int group, int block, const uint8_t* in, size_t size);
  size_t slot_bytes() const;  // of what a step works in, as far as that grows with the largest step

  // Whether a step waits for all its threads before it starts. For tests: it
  // would else begin with those that are awake.
  void set_patient(bool on) { pool_.set_patient(on); }

  // Seconds the calling thread spent in each kind of stage, barriers included;
  // only counted while profiling.
  void set_profiling(bool on) { profiling_ = on; }
  const std::array<double, kStageKinds>& seconds() const { return seconds_; }

 private:
  int width(int slot) const;
  void building() const;
  void whole_batch() const;
  void add_row_op(std::unique_ptr<RowOp> op, int written);
  void quantize(int slot);
  void written(int slot);
  std::unique_ptr<RowStage> take_row_stage();
  std::unique_lock<std::mutex> enter();  // one caller at a time
  void allocate_slots();
  void run_stages(const Step& step);

  const Limits limits_;
  const KernelTable& kernels_;
  KvCache kv_;
  ThreadPool pool_;
  Workspace work_;
  std::vector<std::unique_ptr<Stage>> stages_;
  RowStage* row_stage_ = nullptr;        // the last stage, if it is one of rows
  MatmulStage* matmul_stage_ = nullptr;  // the last stage, if it is one of matmuls
  HeadStage* head_ = nullptr;
  std::vector<size_t> next_weights_;   // per stage: the next one that reads weights
  std::vector<ReadAhead> read_ahead_;  // per thread
  bool wanted_ = false;                // select_rows was called
  SlotSet quantized_;                  // slots that some matmul reads as 8-bit integers
  std::vector<bool> has_quantized_;    // whose 8-bit copy is up to date at this point of the program
  SlotSet private_;                    // slots that threads may want copies of
  size_t attention_floats_ = 0, partial_floats_ = 0;
  std::optional<Batch> batch_;
  std::mutex stepping_;
  bool profiling_ = false;
  std::array<double, kStageKinds> seconds_{};
};

}  // namespace setpoint
