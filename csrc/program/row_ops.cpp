#include "program/row_ops.h"

#include <algorithm>

namespace setpoint {

namespace {

constexpr int kRowTile = 8;  // rows that pass through a stage's ops together

}  // namespace

void RowStage::run(const Step& step, int thread) {
  const long rows = step.num_rows(wanted_), threads = step.pool.size();
  // Rounded up, so that a single row is the caller's: it is awake for certain.
  const int first = static_cast<int>((rows * thread + threads - 1) / threads);
  const int last = static_cast<int>((rows * (thread + 1) + threads - 1) / threads);
  for (int begin = first; begin < last; begin += kRowTile) {
    const int end = std::min(begin + kRowTile, last);
    for (const auto& op : ops_) op->run(step, begin, end);
  }
}

void Embed::run(const Step& step, int begin, int end) const {
  FloatRows& out = step.work.slots[static_cast<size_t>(out_)];
  for (int row = begin; row < end; ++row) {
    const size_t token = static_cast<size_t>(step.batch.inputs().tokens[static_cast<size_t>(row)]);
    float* values = out.row(row);
    dequantize_blocks(format_, table_ + token * row_bytes_, out.width, values);
    if (scale_ != 1.f)
      for (int i = 0; i < out.width; ++i) values[i] *= scale_;
  }
}

void FillRope::run(const Step& step, int begin, int end) const {
  for (int row = begin; row < end; ++row) step.work.ropes[static_cast<size_t>(table_)].fill(row, step.batch.position_of(row));
}

void RmsNorm::run(const Step& step, int begin, int end) const {
  FloatRows& in = step.work.slots[static_cast<size_t>(in_)];
  FloatRows& out = step.work.slots[static_cast<size_t>(out_)];
  step.kernels.rms_norm(in.row(begin), in.stride, weight_.data(), eps_, end - begin, in.width, out.row(begin), out.stride);
}

void HeadNorm::run(const Step& step, int begin, int end) const {
  FloatRows& slot = step.work.slots[static_cast<size_t>(slot_)];
  const int head_dim = static_cast<int>(weight_.size());
  for (int row = begin; row < end; ++row)
    step.kernels.rms_norm(slot.row(row), weight_.size(), weight_.data(), eps_, heads_, head_dim, slot.row(row), weight_.size());
}

void Rope::run(const Step& step, int begin, int end) const {
  FloatRows& slot = step.work.slots[static_cast<size_t>(slot_)];
  const RopeTable& table = step.work.ropes[static_cast<size_t>(table_)];
  const size_t first = static_cast<size_t>(begin) * table.inv_freq.size();
  step.kernels.rope(slot.row(begin), slot.stride, end - begin, heads_, head_dim_, table.half(), table.cos.data() + first,
                    table.sin.data() + first);
}

void KvStore::run(const Step& step, int begin, int end) const {
  FloatRows& k = step.work.slots[static_cast<size_t>(k_)];
  FloatRows& v = step.work.slots[static_cast<size_t>(v_)];
  for (int row = begin; row < end;) {  // a run of rows of one entry at a time
    const int entry = step.batch.entry_of(row);
    const int stop = std::min(end, step.batch.entries()[static_cast<size_t>(entry)].end);
    KvStoreArgs args;
    args.kv = step.kv.view(layer_);
    args.block_table = step.batch.block_table(step.kv.group_of(layer_), entry);
    args.position = step.batch.position_of(row);
    args.rows = stop - row;
    args.k = k.row(row);
    args.v = v.row(row);
    args.k_stride = k.stride;
    args.v_stride = v.stride;
    step.kernels.kv_store(args);
    row = stop;
  }
}

void Quantize::run(const Step& step, int begin, int end) const {
  FloatRows& in = step.work.slots[static_cast<size_t>(in_)];
  step.work.quantized.quantize(step.kernels, in.row(begin), in.stride, begin, end - begin, k_);
}

void GatedMultiply::run(const Step& step, int begin, int end) const {
  FloatRows& gate = step.work.slots[static_cast<size_t>(gate_)];
  FloatRows& up = step.work.slots[static_cast<size_t>(up_)];
  const auto kernel = act_ == Activation::silu ? step.kernels.silu_mul : step.kernels.gelu_tanh_mul;
  kernel(gate.row(begin), up.row(begin), gate.stride, end - begin, gate.width, gate.row(begin), gate.stride);
}

void SelectRows::run(const Step& step, int begin, int end) const {
  FloatRows& in = step.work.slots[static_cast<size_t>(in_)];
  FloatRows& out = step.work.slots[static_cast<size_t>(out_)];
  for (int row = begin; row < end; ++row)
    std::copy_n(in.row(step.batch.inputs().rows[static_cast<size_t>(row)].token), in.width, out.row(row));
}

void Add::run(const Step& step, int begin, int end) const {
  FloatRows& in = step.work.slots[static_cast<size_t>(in_)];
  FloatRows& out = step.work.slots[static_cast<size_t>(out_)];
  step.kernels.add(in.row(begin), in.stride, end - begin, in.width, out.row(begin), out.stride);
}

}  // namespace setpoint
