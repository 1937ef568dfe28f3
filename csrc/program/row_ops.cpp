#include "program/row_ops.h"

#include <algorithm>

namespace setpoint {

void Embed::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& out = view.values(out_);
  for (int row = begin; row < end; ++row) {
    const size_t token = static_cast<size_t>(step.batch.inputs().tokens[static_cast<size_t>(row)]);
    float* values = out.row(row);
    dequantize_blocks(format_, table_ + token * row_bytes_, out.width, values);
    if (scale_ != 1.f)
      for (int i = 0; i < out.width; ++i) values[i] *= scale_;
  }
}

void FillRope::run(const Step& step, const SlotView& view, int begin, int end) const {
  if (!view.is_shared()) return;
  for (int row = begin; row < end; ++row) step.work.ropes[static_cast<size_t>(table_)].fill(row, step.batch.position_of(row));
}

void RmsNorm::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& in = view.values(in_);
  FloatRows& out = view.values(out_);
  step.kernels.rms_norm(in.row(begin), in.stride, weight_.data(), eps_, end - begin, in.width, out.row(begin), out.stride);
}

void HeadNorm::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& slot = view.values(slot_);
  const int head_dim = static_cast<int>(weight_.size());
  for (int row = begin; row < end; ++row)
    step.kernels.rms_norm(slot.row(row), weight_.size(), weight_.data(), eps_, heads_, head_dim, slot.row(row), weight_.size());
}

void Rope::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& slot = view.values(slot_);
  const RopeTable& table = step.work.ropes[static_cast<size_t>(table_)];
  const size_t first = static_cast<size_t>(begin) * table.inv_freq.size();
  step.kernels.rope(slot.row(begin), slot.stride, end - begin, heads_, head_dim_, table.half(), table.cos.data() + first,
                    table.sin.data() + first);
}

void KvStore::run(const Step& step, const SlotView& view, int begin, int end) const {
  if (!view.is_shared()) return;
  FloatRows& k = view.values(k_);
  FloatRows& v = view.values(v_);
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

void Quantize::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& in = view.values(in_);
  view.quantized(in_).quantize(step.kernels, in.row(begin), in.stride, begin, end - begin, 0, in.width);
}

void multiply_gated(const Step& step, Activation act, FloatRows& gate, FloatRows& up, int begin, int end, int column, int columns) {
  const auto kernel = act == Activation::silu ? step.kernels.silu_mul : step.kernels.gelu_tanh_mul;
  kernel(gate.row(begin) + column, up.row(begin) + column, gate.stride, end - begin, columns, gate.row(begin) + column, gate.stride);
}

void GatedMultiply::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& gate = view.values(gate_);
  multiply_gated(step, act_, gate, view.values(up_), begin, end, 0, gate.width);
}

void SelectRows::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& in = view.values(in_);
  FloatRows& out = view.values(out_);
  for (int row = begin; row < end; ++row)
    std::copy_n(in.row(step.batch.inputs().rows[static_cast<size_t>(row)].token), in.width, out.row(row));
}

void Add::run(const Step& step, const SlotView& view, int begin, int end) const {
  FloatRows& a = view.values(a_);
  FloatRows& b = view.values(b_);
  FloatRows& out = view.values(out_);
  step.kernels.add(a.row(begin), b.row(begin), a.stride, end - begin, a.width, out.row(begin), out.stride);
}

}  // namespace setpoint
