#include "program/program.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>

#include "program/attention_stage.h"

namespace setpoint {

namespace {

using Clock = std::chrono::steady_clock;

// Bytes of the next weights that a thread fetches before it arrives at a barrier, and in all while it waits there.
constexpr size_t kFetchedBefore = size_t{16} << 10, kFetchedWaiting = size_t{64} << 10, kFetchedAtOnce = 512;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Program::Program(const Options& options)
    : limits_(options.limits), kernels_(kernel_table(options.isa.c_str())), kv_(options.kv_format), pool_(options.num_threads) {
  const Limits& limits = options.limits;
  require(limits.vocab > 0 && limits.max_tokens > 0 && limits.max_entries > 0 && limits.max_rows > 0 && limits.max_model_len > 0,
          "every limit of a program must be positive");
  require(limits.vocab <= 1 << 24 && limits.max_tokens <= 1 << 20 && limits.max_entries <= 1 << 16 && limits.max_rows <= 1 << 20 &&
              limits.max_model_len <= 1 << 24,
          "a limit of the program is absurdly large");
}

void Program::building() const { require(head_ == nullptr, "the program is complete"); }

void Program::whole_batch() const { require(!wanted_, "the op needs every token, and comes after select_rows"); }

int Program::width(int slot) const {
  require(slot >= 0 && static_cast<size_t>(slot) < work_.slots.size(), "no such slot");
  return work_.slots[static_cast<size_t>(slot)].values.width;
}

int Program::slot(int width) {
  building();
  require(width > 0 && width <= 1 << 24, "bad slot width");
  work_.slots.push_back({FloatRows(std::max(limits_.max_tokens, limits_.max_rows), width), {}});
  has_quantized_.push_back(false);
  return static_cast<int>(work_.slots.size()) - 1;
}

int Program::rope_table(std::vector<float> inv_freq, float factor) {
  building();
  require(!inv_freq.empty() && inv_freq.size() <= 4096, "bad rope table");
  work_.ropes.emplace_back(limits_.max_tokens, std::move(inv_freq), factor);
  const int table = static_cast<int>(work_.ropes.size()) - 1;
  add_row_op(std::make_unique<FillRope>(table), -1);
  return table;
}

void Program::written(int slot) {
  if (slot >= 0) has_quantized_[static_cast<size_t>(slot)] = false;
}

void Program::add_row_op(std::unique_ptr<RowOp> op, int slot) {
  building();
  if (row_stage_ == nullptr) {
    auto stage = std::make_unique<RowStage>(wanted_);
    row_stage_ = stage.get();
    stages_.push_back(std::move(stage));
  }
  matmul_stage_ = nullptr;
  row_stage_->add(std::move(op));
  written(slot);
}

void Program::embed(const BlockFormat& format, const uint8_t* table, size_t size, float scale, int out) {
  const size_t row_bytes = bytes_per_row(format, width(out));
  require(size / row_bytes >= static_cast<size_t>(limits_.vocab), "the embedding has fewer rows than the vocabulary");
  whole_batch();
  add_row_op(std::make_unique<Embed>(format, table, row_bytes, scale, out), out);
}

void Program::rms_norm(int in, std::vector<float> weight, float eps, int out) {
  require(width(in) == width(out) && weight.size() == static_cast<size_t>(width(in)), "rms_norm: widths differ");
  add_row_op(std::make_unique<RmsNorm>(in, std::move(weight), eps, out), out);
}

void Program::head_norm(int slot, std::vector<float> weight, float eps) {
  require(!weight.empty() && static_cast<size_t>(width(slot)) % weight.size() == 0, "head_norm: the slot is not whole heads");
  const int heads = width(slot) / static_cast<int>(weight.size());
  add_row_op(std::make_unique<HeadNorm>(slot, std::move(weight), eps, heads), slot);
}

void Program::rope(int slot, int head_dim, int table) {
  whole_batch();
  require(table >= 0 && static_cast<size_t>(table) < work_.ropes.size(), "no such rope table");
  require(head_dim > 0 && width(slot) % head_dim == 0 && 2 * work_.ropes[static_cast<size_t>(table)].half() <= head_dim,
          "rope: bad head_dim");
  add_row_op(std::make_unique<Rope>(slot, width(slot) / head_dim, head_dim, table), slot);
}

// Where the slot has just been computed chunk by chunk, chunk by chunk.
void Program::quantize(int slot) {
  if (has_quantized_[static_cast<size_t>(slot)]) return;
  if (matmul_stage_ != nullptr && matmul_stage_->gated_slot() == slot)
    matmul_stage_->follow_with_quantize();
  else
    add_row_op(std::make_unique<Quantize>(slot), -1);
  quantized_.add(slot);
  has_quantized_[static_cast<size_t>(slot)] = true;
}

// The stage under construction, to lead in the next one.
std::unique_ptr<RowStage> Program::take_row_stage() {
  std::unique_ptr<RowStage> taken(static_cast<RowStage*>(stages_.back().release()));
  stages_.pop_back();
  row_stage_ = nullptr;
  private_.add(taken->written().values);
  return taken;
}

void Program::matmul(const PackedWeight& weight, int in, int out, std::vector<float> bias, bool accumulate) {
  building();
  require(weight.k == width(in) && weight.n == width(out) && in != out, "matmul: the weight does not fit the slots");
  require(bias.empty() || bias.size() == static_cast<size_t>(weight.n), "matmul: the bias does not fit the weight");
  const bool quantized = weight.is_quantized();
  if (quantized) quantize(in);
  MatmulStage::Item item{weight, out, std::move(bias), accumulate};
  if (matmul_stage_ == nullptr || !matmul_stage_->accepts(in, quantized, item)) {
    const bool lead_in = row_stage_ != nullptr && row_stage_->leaves_alone(out);
    auto stage = std::make_unique<MatmulStage>(in, quantized, wanted_, lead_in ? take_row_stage() : nullptr);
    matmul_stage_ = stage.get();
    stages_.push_back(std::move(stage));
  }
  row_stage_ = nullptr;
  matmul_stage_->add(std::move(item));
  written(out);
}

void Program::kv_store(int layer, int k, int v) {
  whole_batch();
  const KvView& kv = kv_.view(layer);
  require(width(k) == kv.kv_heads * kv.head_dim && width(v) == width(k), "kv_store: the slots do not fit the layer");
  add_row_op(std::make_unique<KvStore>(layer, k, v), -1);
}

void Program::attention(int layer, float scale, int q, int out) {
  building();
  whole_batch();
  const KvView& kv = kv_.view(layer);
  require(width(q) == width(out) && width(q) % (kv.kv_heads * kv.head_dim) == 0, "attention: the slots do not fit the layer");
  const int heads = width(q) / kv.head_dim;
  auto stage = std::make_unique<AttentionStage>(layer, heads, scale, q, out);
  stage->reserve(kv, limits_, pool_.size());
  stages_.push_back(std::move(stage));
  row_stage_ = nullptr;
  matmul_stage_ = nullptr;
  written(out);
  attention_floats_ = std::max(attention_floats_, AttentionStage::scratch_floats(kv, heads));
  partial_floats_ = std::max(partial_floats_, AttentionStage::partial_floats(kv, heads, limits_.max_model_len, pool_.size()));
}

void Program::gated_multiply(Activation act, int gate, int up) {
  building();
  require(width(gate) == width(up) && gate != up, "gated_multiply: the slots do not fit");
  if (matmul_stage_ == nullptr || !matmul_stage_->multiplies(gate, up))
    return add_row_op(std::make_unique<GatedMultiply>(act, gate, up), gate);
  matmul_stage_->follow_with(act);
  written(gate);
}

void Program::add(int a, int b, int out) {
  require(width(a) == width(out) && width(b) == width(out), "add: widths differ");
  add_row_op(std::make_unique<Add>(a, b, out), out);
}

void Program::select_rows(int in, int out) {
  require(width(in) == width(out) && in != out, "select_rows: widths differ");
  if (!wanted_) row_stage_ = nullptr;  // the stage so far is one of all rows
  wanted_ = true;
  has_quantized_.assign(has_quantized_.size(), false);
  add_row_op(std::make_unique<SelectRows>(in, out), out);
}

void Program::head(int in, std::vector<float> norm_weight, float eps, const PackedWeight& weight) {
  building();
  require(weight.k == width(in), "head: the weight does not fit the slot");
  require(!stages_.empty(), "head: nothing computes its input");
  auto stage =
      std::make_unique<HeadStage>(in, wanted_, HeadStage::Norm{std::move(norm_weight), eps}, weight, limits_, pool_.size(), kernels_.isa);
  allocate_slots();
  kv_.allocate();
  read_ahead_.resize(static_cast<size_t>(pool_.size()));
  for (int thread = 0; thread < pool_.size(); ++thread) work_.attention_scratch.emplace_back(attention_floats_);
  work_.partials = MappedArray<float>(partial_floats_);
  batch_.emplace(limits_, kv_.groups());
  head_ = stage.get();
  stages_.push_back(std::move(stage));
  next_weights_.assign(stages_.size(), stages_.size() - 1);
  for (size_t i = stages_.size() - 1; i-- > 0;)
    next_weights_[i] = stages_[i + 1]->kind() == StageKind::matmul ? i + 1 : next_weights_[i + 1];
}

// The copies of slots that only the finished program knows of.
void Program::allocate_slots() {
  const int rows = std::max(limits_.max_tokens, limits_.max_rows);
  work_.private_slots.resize(static_cast<size_t>(pool_.size()));
  for (size_t i = 0; i < work_.slots.size(); ++i) {
    const int slot = static_cast<int>(i), width = work_.slots[i].values.width;
    if (quantized_.has(slot)) work_.slots[i].quantized = QuantizedActivations(rows, width);
    for (size_t thread = 0; thread < work_.private_slots.size(); ++thread) {
      Slot copy;
      if (thread > 0 && private_.has(slot)) copy.values = FloatRows(kPrivateRows, width);
      if (thread > 0 && quantized_.has(slot)) copy.quantized = QuantizedActivations(kPrivateRows, width);
      work_.private_slots[thread].push_back(std::move(copy));
    }
  }
}

void Program::run_stages(const Step& step) {
  for (ReadAhead& ahead : read_ahead_) ahead = {};
  Clock::time_point mark = Clock::now();
  const auto account = [&](size_t stage) {  // barriers included
    const auto now = Clock::now();
    seconds_[static_cast<size_t>(stages_[stage]->kind())] += std::chrono::duration<double>(now - mark).count();
    mark = now;
  };
  const auto run = [&](int index, int thread) {
    const size_t i = static_cast<size_t>(index);
    if (profiling_ && thread == 0 && i > 0) account(i - 1);
    stages_[i]->run(step, thread);
    if (thread == 0 && i + 2 == stages_.size() && step.batch.has_late_masks()) {  // the others wait for it all the same
      step.batch.take_late_masks();
      head_->prepare_masks(step);
    }
    ReadAhead& ahead = read_ahead_[static_cast<size_t>(thread)];
    if (i + 1 < stages_.size()) ahead.aim(stages_[next_weights_[i]]->first_reads(step, thread));
    ahead.fetch(kFetchedBefore, kFetchedBefore);
  };
  const auto idle = [&](int thread) { return read_ahead_[static_cast<size_t>(thread)].fetch(kFetchedAtOnce, kFetchedWaiting); };
  pool_.run_stages(static_cast<int>(stages_.size()), run, idle);
  if (profiling_) account(stages_.size() - 1);
}

size_t Program::slot_bytes() const {
  size_t bytes = 0;
  for (const Slot& slot : work_.slots)
    bytes += 4 * slot.values.values.size() + slot.quantized.codes.size() + 4 * (slot.quantized.scales.size() + slot.quantized.sums.size());
  for (const RopeTable& table : work_.ropes) bytes += 4 * (table.cos.size() + table.sin.size());
  return bytes;
}

const RowOutput* Program::outputs() const {
  require(head_ != nullptr, "the program has no head yet");
  return head_->outputs();
}

std::unique_lock<std::mutex> Program::enter() {
  require(head_ != nullptr, "the program has no head yet");
  std::unique_lock entered(stepping_, std::try_to_lock);
  if (!entered) throw std::runtime_error("another thread is in a step of this program");
  return entered;
}

size_t Program::shorten_head(std::span<const int32_t> tokens) {
  require(head_ != nullptr, "the program has no head yet");
  if (!head_->can_shorten()) return 0;
  const int count = static_cast<int>(tokens.size()), pages = (count + kPageTokens - 1) / kPageTokens;
  std::vector<int32_t> blocks(static_cast<size_t>(pages));
  std::iota(blocks.begin(), blocks.end(), 0);
  const std::vector<BlockTables> tables(kv_.groups().size(), BlockTables{blocks.data(), pages});
  std::vector<RowRecord> rows(tokens.size());
  for (int i = 0; i < count; ++i) {
    RowRecord& row = rows[static_cast<size_t>(i)];
    row = {};
    row.token = i;
    row.target = row.num_logprobs = row.allowed_end = row.mask_end = -1;
  }
  const int32_t starts[] = {0, count}, position = 0;
  StepInputs inputs;
  inputs.tokens = tokens;
  inputs.entry_starts = starts;
  inputs.entry_positions = {&position, 1};
  inputs.tables = tables;
  inputs.rows = rows;
  head_->collect(true);
  try {
    step(inputs);
  } catch (...) {
    head_->collect(false);
    throw;
  }
  head_->collect(false);
  const auto entered = enter();
  head_->shorten(kernels_, pool_);
  return head_->greedy_bytes();
}

void Program::put_shortlist(uint8_t* memory) {
  require(head_ != nullptr, "the program has no head yet");
  head_->put_shortlist(memory);
}

size_t Program::take_up_shortlist() {
  require(head_ != nullptr, "the program has no head yet");
  const auto entered = enter();
  head_->take_up_shortlist(pool_.size());
  return head_->greedy_bytes();
}

void Program::read_kv(int group, int block, uint8_t* out, size_t size) {
  const auto entered = enter();
  kv_.read_block(group, block, out, size);
}

void Program::write_kv(int group, int block, const uint8_t* in, size_t size) {
  const auto entered = enter();
  kv_.write_block(group, block, in, size);
}

void Program::check(const StepInputs& inputs) {
  const auto entered = enter();
  batch_->load(inputs);
}

void Program::step(const StepInputs& inputs) {
  const auto entered = enter();
  batch_->load(inputs);
  for (size_t group = 0; group < kv_.groups().size(); ++group)
    kv_.note_use(static_cast<int>(group), batch_->highest_block(static_cast<int>(group)));
  const Step step{kernels_, *batch_, kv_, work_, pool_};
  for (const auto& stage : stages_) stage->prepare(step);
  run_stages(step);
}

}  // namespace setpoint
