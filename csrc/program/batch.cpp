#include "program/batch.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace setpoint {

namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

constexpr int kBlockPages = kBlockTokens / kPageTokens;

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

size_t index(int i) { return static_cast<size_t>(i); }

void check_range(int begin, int end, size_t size, const char* list, int row) {
  if (begin < 0 || end < begin || static_cast<size_t>(end) > size) refuse("row " + std::to_string(row) + ": bad range of " + list);
}

void check_ids(std::span<const int32_t> ids, int vocab, const char* list) {
  for (const int32_t id : ids)
    if (id < 0 || id >= vocab) refuse(std::string("a token id of ") + list + " lies outside the vocabulary");
}

}  // namespace

Batch::Batch(const Limits& limits, const std::vector<KvGroup>& groups)
    : limits_(limits),
      groups_(groups),
      table_width_(round_up((limits.max_model_len + kPageTokens - 1) / kPageTokens, kBlockPages)),
      highest_blocks_(groups.size()),
      entry_of_(index(limits.max_tokens)),
      positions_(index(limits.max_tokens)),
      tables_(groups.size() * index(limits.max_entries) * index(table_width_)) {
  entries_.reserve(index(limits.max_entries));
  tiles_.reserve(index(limits.max_tokens / kAttentionTileRows + limits.max_entries));
}

const int32_t* Batch::block_table(int group, int entry) const {
  return tables_.data() + (index(group) * index(limits_.max_entries) + index(entry)) * index(table_width_);
}

void Batch::load(const StepInputs& inputs) {
  inputs_ = &inputs;
  load_entries(inputs);
  load_tables(inputs);
  check_rows(inputs);
}

void Batch::load_entries(const StepInputs& inputs) {
  const size_t num_entries = inputs.entry_positions.size();
  if (inputs.tokens.empty() || inputs.tokens.size() > index(limits_.max_tokens))
    refuse("a step holds 1 to " + std::to_string(limits_.max_tokens) + " tokens");
  if (num_entries == 0 || num_entries > index(limits_.max_entries))
    refuse("a step holds 1 to " + std::to_string(limits_.max_entries) + " entries");
  if (inputs.entry_starts.size() != num_entries + 1 || inputs.entry_starts[0] != 0 ||
      index(inputs.entry_starts[num_entries]) != inputs.tokens.size())
    refuse("entry_starts does not cover the step's tokens");
  check_ids(inputs.tokens, limits_.vocab, "the step");
  entries_.clear();
  tiles_.clear();
  last_position_ = 0;
  for (size_t e = 0; e < num_entries; ++e) {
    const int begin = inputs.entry_starts[e], end = inputs.entry_starts[e + 1], position = inputs.entry_positions[e];
    if (begin >= end || index(end) > inputs.tokens.size()) refuse("entry " + std::to_string(e) + " holds no token");
    if (position < 0 || position > limits_.max_model_len - (end - begin)) refuse("entry " + std::to_string(e) + " exceeds max_model_len");
    entries_.push_back({begin, end, position});
    last_position_ = std::max(last_position_, position + (end - begin) - 1);
    for (int row = begin; row < end; ++row) {
      entry_of_[index(row)] = static_cast<int32_t>(e);
      positions_[index(row)] = position + (row - begin);
    }
    for (int row = begin; row < end; row += kAttentionTileRows)
      tiles_.push_back({static_cast<int>(e), row, std::min(kAttentionTileRows, end - row), position + (row - begin)});
  }
}

void Batch::load_tables(const StepInputs& inputs) {
  if (inputs.tables.size() != groups_.size()) refuse("one set of block tables per KV group is needed");
  for (size_t g = 0; g < groups_.size(); ++g) {
    const BlockTables& given = inputs.tables[g];
    highest_blocks_[g] = 0;
    for (size_t e = 0; e < entries_.size(); ++e) {
      const Entry& entry = entries_[e];
      const int last = (entry.position + (entry.end - entry.begin) - 1) / kPageTokens;
      const int first = groups_[g].window == 0 ? 0 : std::max(0, entry.position - groups_[g].window + 1) / kPageTokens;
      if (last >= given.width) refuse("entry " + std::to_string(e) + ": its block table is too short");
      const int32_t* source = given.ids + e * index(given.width);
      int32_t* table = tables_.data() + (g * index(limits_.max_entries) + e) * index(table_width_);
      // Whole attention blocks around the visible ones are made readable;
      // nothing else is ever read.
      std::fill(table + first / kBlockPages * kBlockPages, table + first, 0);
      for (int block = first; block <= last; ++block) {
        if (source[block] < 0 || source[block] >= groups_[g].num_blocks)
          refuse("entry " + std::to_string(e) + ": block id outside the pool");
        table[block] = source[block];
        highest_blocks_[g] = std::max(highest_blocks_[g], source[block]);
      }
      std::fill(table + last + 1, table + round_up(last + 1, kBlockPages), 0);
    }
  }
}

void Batch::check_rows(const StepInputs& inputs) const {
  if (inputs.rows.size() > index(limits_.max_rows)) refuse("more rows of logits than " + std::to_string(limits_.max_rows));
  if (inputs.penalty_ids.size() != inputs.penalty_counts.size() || inputs.bias_ids.size() != inputs.bias_values.size())
    refuse("ids and values of a sampling list differ in length");
  check_ids(inputs.penalty_ids, limits_.vocab, "the penalties");
  check_ids(inputs.bias_ids, limits_.vocab, "the bias");
  check_ids(inputs.banned, limits_.vocab, "the banned tokens");
  check_ids(inputs.allowed, limits_.vocab, "the allowed tokens");
  for (size_t r = 0; r < inputs.rows.size(); ++r) {
    const RowRecord& row = inputs.rows[r];
    const int number = static_cast<int>(r);
    if (row.token < 0 || index(row.token) >= inputs.tokens.size()) refuse("row " + std::to_string(r) + " names no token of the step");
    if (row.target < -1 || row.target >= limits_.vocab) refuse("row " + std::to_string(r) + ": target outside the vocabulary");
    if (row.num_logprobs < -1 || row.num_logprobs > 20) refuse("row " + std::to_string(r) + ": at most 20 logprobs");
    if (row.top_k < 0 || !std::isfinite(row.temperature) || row.temperature < 0 || std::isnan(row.top_p) || std::isnan(row.min_p))
      refuse("row " + std::to_string(r) + ": bad sampling values");
    check_range(row.penalty_begin, row.penalty_end, inputs.penalty_ids.size(), "penalties", number);
    check_range(row.bias_begin, row.bias_end, inputs.bias_ids.size(), "biases", number);
    check_range(row.banned_begin, row.banned_end, inputs.banned.size(), "banned tokens", number);
    if (row.allowed_end != -1) check_range(row.allowed_begin, row.allowed_end, inputs.allowed.size(), "allowed tokens", number);
    if (row.mask_end != -1) check_mask_size(inputs, row, number);
  }
  if (inputs.masks_ready == nullptr) check_masks(inputs);
}

// A mask covers the vocabulary ...
void Batch::check_mask_size(const StepInputs& inputs, const RowRecord& row, int number) const {
  check_range(row.mask_begin, row.mask_end, inputs.masks.size(), "mask words", number);
  if (row.mask_end - row.mask_begin != round_up(limits_.vocab, 32) / 32)
    refuse("row " + std::to_string(number) + ": a mask of another vocabulary");
}

// ... and allows some of it.
void Batch::check_masks(const StepInputs& inputs) const {
  for (size_t r = 0; r < inputs.rows.size(); ++r) {
    const RowRecord& row = inputs.rows[r];
    if (row.mask_end == -1) continue;
    const auto words = inputs.masks.subspan(index(row.mask_begin), index(row.mask_end - row.mask_begin));
    const uint32_t last = words.back() & (limits_.vocab % 32 == 0 ? ~0u : (1u << limits_.vocab % 32) - 1);
    const auto is_set = [](uint32_t word) { return word != 0; };
    if (last == 0 && std::none_of(words.begin(), words.end() - 1, is_set))
      refuse("row " + std::to_string(r) + ": its mask allows no token");
  }
}

void Batch::take_late_masks() const {
  if (!inputs_->masks_ready->pass()) throw std::runtime_error("the masks of a step did not come");
  check_masks(*inputs_);
}

}  // namespace setpoint
