// One step's ragged batch: what Python passes (StepInputs), checked and laid
// out for the ops (Batch).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/gate.h"
#include "core/memory.h"
#include "program/kv_cache.h"

namespace setpoint {

// A row whose logits are wanted; runtime/cpu/arrays.py writes records of this
// layout. Ranges index the flat lists of StepInputs. target -1 = draw a token;
// num_logprobs -1 = none; allowed_end or mask_end -1 = every token is allowed by it.
struct RowRecord {
  uint64_t seed;
  int64_t position;
  float temperature, top_p, min_p, repetition, frequency, presence;
  int32_t token;  // index into StepInputs::tokens
  int32_t top_k, target, num_logprobs;
  int32_t penalty_begin, penalty_end, bias_begin, bias_end, banned_begin, banned_end, allowed_begin, allowed_end;
  int32_t mask_begin, mask_end;  // words of 32 tokens, lowest bit first
};
static_assert(sizeof(RowRecord) == 96);

struct BlockTables {
  const int32_t* ids = nullptr;  // [entries][width]: logical block -> block id,
                                 // -1 where there is none
  int width = 0;
};

struct StepInputs {
  std::span<const int32_t> tokens;
  std::span<const int32_t> entry_starts;     // [entries + 1] into tokens
  std::span<const int32_t> entry_positions;  // [entries] position of an entry's first token
  std::span<const BlockTables> tables;       // per KV group
  std::span<const RowRecord> rows;
  std::span<const int32_t> penalty_ids, penalty_counts, bias_ids, banned, allowed;
  std::span<const uint32_t> masks;
  std::span<const float> bias_values;
  Gate* masks_ready = nullptr;  // null: the masks are there; else they are when it opens, and are not read before
  float* logits = nullptr;      // [rows][vocab] or null: a copy of the raw logits
};

struct Limits {
  int vocab = 0;
  int max_tokens = 0;  // of a step
  int max_entries = 0;
  int max_rows = 0;
  int max_model_len = 0;
};

class Batch {
 public:
  struct Entry {
    int begin = 0, end = 0;  // rows of the step
    int position = 0;        // of row `begin`
  };
  struct Tile {  // up to kAttentionTileRows consecutive rows of one entry
    int entry = 0;
    int begin = 0, rows = 0;
    int position = 0;
  };

  Batch(const Limits& limits, const std::vector<KvGroup>& groups);

  // Checks every number that ops will use as an index, then takes the step
  // over. `inputs` must outlive the step. Throws std::invalid_argument naming
  // the entry or row, and leaves the batch unusable until the next load.
  void load(const StepInputs& inputs);

  // Waits for masks that come late, then checks them too. Throws std::runtime_error when they do not come.
  void take_late_masks() const;

  const StepInputs& inputs() const { return *inputs_; }
  bool has_late_masks() const { return inputs_->masks_ready != nullptr; }
  int num_tokens() const { return static_cast<int>(inputs_->tokens.size()); }
  int num_rows() const { return static_cast<int>(inputs_->rows.size()); }
  std::span<const Entry> entries() const { return {entries_.data(), entries_.size()}; }
  std::span<const Tile> tiles() const { return {tiles_.data(), tiles_.size()}; }
  int last_position() const { return last_position_; }
  int entry_of(int row) const { return entry_of_[static_cast<size_t>(row)]; }
  int position_of(int row) const { return positions_[static_cast<size_t>(row)]; }
  int highest_block(int group) const { return highest_blocks_[static_cast<size_t>(group)]; }
  // Logical block -> block id. Blocks that no query sees are 0, and the table
  // is readable to the end of the last 64-token attention block: a kernel may
  // load a page whose tokens are all masked.
  const int32_t* block_table(int group, int entry) const;

 private:
  void load_entries(const StepInputs& inputs);
  void load_tables(const StepInputs& inputs);
  void check_rows(const StepInputs& inputs) const;
  void check_mask_size(const StepInputs& inputs, const RowRecord& row, int number) const;
  void check_masks(const StepInputs& inputs) const;

  const Limits limits_;
  const std::vector<KvGroup> groups_;
  const int table_width_;
  const StepInputs* inputs_ = nullptr;
  std::vector<Entry> entries_;
  std::vector<Tile> tiles_;
  int last_position_ = 0;
  std::vector<int> highest_blocks_;            // per group
  MappedArray<int32_t> entry_of_, positions_;  // [max_tokens]
  MappedArray<int32_t> tables_;                // [groups][max_entries][table_width]
};

}  // namespace setpoint
