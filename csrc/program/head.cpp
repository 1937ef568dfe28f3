#include "program/head.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace setpoint {

namespace {

constexpr size_t kLogitsBytes = size_t{32} << 20;
// Masks that leave at most one panel in so many are cheaper to follow than to screen the whole matrix.
constexpr int kSparse = 8;

int rows_of_a_chunk(const Limits& limits) {
  const size_t fit = kLogitsBytes / sizeof(float) / static_cast<size_t>(limits.vocab);
  return std::min(limits.max_rows, static_cast<int>(std::clamp<size_t>(fit, 8, 64)));
}

}  // namespace

HeadStage::HeadStage(int in, bool selected, Norm norm, PackedWeight weight, const Limits& limits, int threads, const char* isa)
    : in_(in),
      selected_(selected),
      norm_(std::move(norm)),
      weight_(weight),
      chunk_rows_(rows_of_a_chunk(limits)),
      hidden_(chunk_rows_, weight.k),
      logits_(chunk_rows_, weight.n),
      outputs_(static_cast<size_t>(limits.max_rows)),
      schedules_(static_cast<size_t>((limits.max_rows + chunk_rows_ - 1) / chunk_rows_)),
      mask_words_(static_cast<size_t>((limits.vocab + 31) / 32)),
      allowed_(schedules_.size() * mask_words_),
      sparse_(schedules_.size()) {
  if (weight.n != limits.vocab || static_cast<size_t>(weight.k) != norm_.weight.size())
    throw std::invalid_argument("the head's weight must be [vocab, hidden]");
  if (weight.is_quantized()) {
    coarse_ = QuantizedActivations(chunk_rows_, weight.k);
    fine_ = QuantizedActivations(chunk_rows_, weight.k);
  }
  scratch_.reserve(static_cast<size_t>(threads));
  for (int thread = 0; thread < threads; ++thread) scratch_.emplace_back(limits.vocab, isa);
}

int HeadStage::chunk_end(const Step& step, int chunk) const { return std::min(step.batch.num_rows(), (chunk + 1) * chunk_rows_); }

void HeadStage::prepare(const Step& step) {
  for (int chunk = 0; chunk * chunk_rows_ < step.batch.num_rows(); ++chunk) {
    schedules_[static_cast<size_t>(chunk)].reset(chunk_end(step, chunk) - chunk * chunk_rows_, weight_.panels(), step.pool.size());
  }
  if (!step.batch.has_late_masks()) prepare_masks(step);
  if (greedy_) greedy_->prepare();
  if (collecting_) collected_.resize(static_cast<size_t>(step.batch.num_rows()) * static_cast<size_t>(weight_.k));
}

void HeadStage::prepare_masks(const Step& step) {
  for (int chunk = 0; chunk * chunk_rows_ < step.batch.num_rows(); ++chunk) note_allowed(step, chunk);
}

// What the masks of a chunk's rows allow together, where every row has one and needs no other logits.
void HeadStage::note_allowed(const Step& step, int chunk) {
  const StepInputs& inputs = step.batch.inputs();
  const auto rows =
      inputs.rows.subspan(static_cast<size_t>(chunk * chunk_rows_), static_cast<size_t>(chunk_end(step, chunk) - chunk * chunk_rows_));
  const auto is_masked = [](const RowRecord& row) { return row.mask_end >= 0 && row.target < 0 && row.num_logprobs < 0; };
  sparse_[static_cast<size_t>(chunk)] = 0;
  if (inputs.logits != nullptr || !std::all_of(rows.begin(), rows.end(), is_masked)) return;
  uint32_t* allowed = allowed_.data() + static_cast<size_t>(chunk) * mask_words_;
  std::fill_n(allowed, mask_words_, 0u);
  for (const RowRecord& row : rows)
    for (size_t i = 0; i < mask_words_; ++i) allowed[i] |= inputs.masks[static_cast<size_t>(row.mask_begin) + i];
  int panels = 0;
  for (size_t i = 0; i < mask_words_; ++i) panels += ((allowed[i] & 0xffff) != 0) + (allowed[i] >> 16 != 0);
  sparse_[static_cast<size_t>(chunk)] = panels * kSparse <= weight_.panels();
}

// The rows' only question is which token is the most likely.
bool HeadStage::wants_best_of_all(const Step& step, int chunk) const {
  const StepInputs& inputs = step.batch.inputs();
  if (!greedy_ || inputs.logits != nullptr || !greedy_->covers(chunk_end(step, chunk) - chunk * chunk_rows_)) return false;
  const auto plain = [](const RowRecord& row) {
    return row.temperature <= 0.f && row.target < 0 && row.num_logprobs < 0 && row.penalty_begin == row.penalty_end &&
           row.bias_begin == row.bias_end && row.banned_begin == row.banned_end && row.allowed_end < 0;
  };
  return std::all_of(inputs.rows.begin() + chunk * chunk_rows_, inputs.rows.begin() + chunk_end(step, chunk), plain);
}

void HeadStage::shorten(const KernelTable& kernels, ThreadPool& pool) {
  if (shortlist_memory_ == nullptr) {
    own_shortlist_memory_ = MappedArray<uint8_t>(shortlist_bytes());
    shortlist_memory_ = own_shortlist_memory_.data();
  }
  Shortlist shortlist(weight_, std::exchange(collected_, {}), kernels, pool, chunk_rows_, shortlist_memory_);
  greedy_ = std::make_unique<GreedyHead>(std::move(shortlist), pool.size(), chunk_rows_);
}

void HeadStage::take_up_shortlist(int threads) {
  if (shortlist_memory_ == nullptr || !Shortlist::is_made(shortlist_memory_)) return;
  greedy_ = std::make_unique<GreedyHead>(Shortlist(weight_, chunk_rows_, shortlist_memory_), threads, chunk_rows_);
}

void HeadStage::run(const Step& step, int thread) {
  for (int chunk = 0; chunk * chunk_rows_ < step.batch.num_rows(); ++chunk) {
    gather(step, chunk, thread);
    step.pool.barrier();
    if (collecting_) continue;
    const int first = chunk * chunk_rows_;
    if (wants_best_alone(step, chunk)) {
      greedy_->find(step, rows_of(step, chunk), schedules_[static_cast<size_t>(chunk)], thread);
      for (int row = first + thread; row < chunk_end(step, chunk); row += step.pool.team()) {
        RowOutput& output = outputs_[static_cast<size_t>(row)];
        output = {};
        output.token = greedy_->token(row - first, step.pool.team());
        output.finite = 1;
      }
    } else {
      multiply(step, chunk, thread);
      step.pool.barrier();
      for (int row = first + thread; row < chunk_end(step, chunk); row += step.pool.team()) sample(step, row, thread);
    }
    if (chunk_end(step, chunk) < step.batch.num_rows()) step.pool.barrier();  // the next chunk reuses the buffers
  }
}

std::span<const uint8_t> HeadStage::first_reads(const Step& step, int thread) const {
  if (step.batch.num_rows() == 0) return {};
  const int panel = schedules_[0].first_panel(thread, step.pool.team());
  if (panel < 0 || (!step.batch.has_late_masks() && is_sparse(0))) return {};  // late masks may be under way just now
  if (!wants_best_of_all(step, 0)) return stored_from(weight_, panel);
  return stored_from(greedy_->first_weight(weight_, chunk_end(step, 0)), panel);
}

void HeadStage::gather(const Step& step, int chunk, int thread) {
  FloatRows& in = step.work.values(in_);
  for (int row = chunk * chunk_rows_ + thread; row < chunk_end(step, chunk); row += step.pool.team()) {
    const int local = row - chunk * chunk_rows_;
    const float* x = in.row(selected_ ? row : step.batch.inputs().rows[static_cast<size_t>(row)].token);
    step.kernels.rms_norm(x, in.stride, norm_.weight.data(), norm_.eps, 1, hidden_.width, hidden_.row(local), hidden_.stride);
    if (collecting_) std::copy_n(hidden_.row(local), weight_.k, collected_.begin() + static_cast<ptrdiff_t>(row) * weight_.k);
    if (!weight_.is_quantized()) continue;
    coarse_.quantize(step.kernels, hidden_.row(local), hidden_.stride, local, 1, 0, weight_.k);
    coarse_.subtract_from(hidden_.row(local), local);
    fine_.quantize(step.kernels, hidden_.row(local), hidden_.stride, local, 1, 0, weight_.k);
    if (greedy_) greedy_->load_row(local, rows_of(step, chunk));
  }
}

void HeadStage::multiply(const Step& step, int chunk, int thread) {
  const HeadRows rows = rows_of(step, chunk);
  MatmulArgs args;
  args.weight = &weight_;
  args.x = hidden_.values.data();
  args.x_stride = hidden_.stride;
  args.out = logits_.values.data();
  args.out_stride = logits_.stride;
  if (weight_.is_quantized()) {
    args.q = coarse_.view();
    args.fine = fine_.view();
  }
  schedules_[static_cast<size_t>(chunk)].run(thread, step.pool.team(), [&](int row_begin, int row_end, int panel_begin, int panel_end) {
    args.row_begin = row_begin;
    args.row_end = row_end;
    args.panel_begin = panel_begin;
    args.panel_end = panel_end;
    if (is_sparse(chunk))
      multiply_allowed(rows, step.kernels, args, chunk);
    else
      multiply_all(rows, step.kernels, args);
  });
}

void HeadStage::multiply_all(const HeadRows& rows, const KernelTable& kernels, const MatmulArgs& args) const {
  if (weight_.is_quantized())
    rows.multiply(kernels, args.row_begin, args.row_end, args.panel_begin, args.panel_end);
  else
    run_matmul(kernels, args);
}

// Panels without an allowed token are -inf unseen.
void HeadStage::multiply_allowed(const HeadRows& rows, const KernelTable& kernels, MatmulArgs args, int chunk) {
  const int end = args.panel_end;
  while (args.panel_begin < end) {
    const bool wanted = is_allowed(chunk, args.panel_begin);
    args.panel_end = args.panel_begin + 1;
    while (args.panel_end < end && is_allowed(chunk, args.panel_end) == wanted) ++args.panel_end;
    if (wanted) multiply_all(rows, kernels, args);
    for (int row = args.row_begin; !wanted && row < args.row_end; ++row)
      std::fill(logits_.row(row) + args.panel_begin * 16, logits_.row(row) + std::min(args.panel_end * 16, weight_.n),
                -std::numeric_limits<float>::infinity());
    args.panel_begin = args.panel_end;
  }
}

void HeadStage::sample(const Step& step, int row, int thread) {
  const StepInputs& inputs = step.batch.inputs();
  const RowRecord& record = inputs.rows[static_cast<size_t>(row)];
  float* logits = logits_.row(row % chunk_rows_);
  if (inputs.logits != nullptr) std::copy_n(logits, weight_.n, inputs.logits + static_cast<size_t>(row) * static_cast<size_t>(weight_.n));
  SampleArgs args;
  args.logits = logits;
  args.vocab = weight_.n;
  args.temperature = record.temperature;
  args.top_k = record.top_k;
  args.top_p = record.top_p;
  args.min_p = record.min_p;
  args.seed = record.seed;
  args.position = record.position;
  args.repetition = record.repetition;
  args.frequency = record.frequency;
  args.presence = record.presence;
  args.penalty_ids = inputs.penalty_ids.data() + record.penalty_begin;
  args.penalty_counts = inputs.penalty_counts.data() + record.penalty_begin;
  args.num_penalties = record.penalty_end - record.penalty_begin;
  args.bias_ids = inputs.bias_ids.data() + record.bias_begin;
  args.bias_values = inputs.bias_values.data() + record.bias_begin;
  args.num_bias = record.bias_end - record.bias_begin;
  args.banned = inputs.banned.data() + record.banned_begin;
  args.num_banned = record.banned_end - record.banned_begin;
  args.allowed = inputs.allowed.data() + record.allowed_begin;
  args.num_allowed = record.allowed_end == -1 ? -1 : record.allowed_end - record.allowed_begin;
  if (record.mask_end >= 0) args.mask = inputs.masks.data() + record.mask_begin;
  args.target = record.target;
  args.num_logprobs = record.num_logprobs;
  SampleResult result;
  sample_row(args, scratch_[static_cast<size_t>(thread)], result);
  RowOutput& output = outputs_[static_cast<size_t>(row)];
  output.token = result.token;
  output.logprob = result.logprob;
  output.rank = result.rank;
  output.finite = result.finite ? 1 : 0;
  output.num_top = result.num_top;
  std::copy_n(result.top_ids, kMaxLogprobs, output.top_ids);
  std::copy_n(result.top_logprobs, kMaxLogprobs, output.top_logprobs);
}

}  // namespace setpoint
