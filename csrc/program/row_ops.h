// The ops that work row by row. Slots are indices into Workspace::slots.
#pragma once
#include <cstdint>
#include <vector>

#include "program/row_stage.h"
#include "quant/block_format.h"

namespace setpoint {

// out[row] = scale * table[token of row]; the table is a checkpoint's raw
// matrix, decoded row by row.
class Embed : public RowOp {
 public:
  Embed(const BlockFormat& format, const uint8_t* table, size_t row_bytes, float scale, int out)
      : format_(format), table_(table), row_bytes_(row_bytes), scale_(scale), out_(out) {}
  Slots slots() const override { return {{}, out_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  const BlockFormat& format_;
  const uint8_t* table_;
  size_t row_bytes_;
  float scale_;
  int out_;
};

// cos and sin for the rows' positions. Written for all threads by the one with the shared slots, like the cache by
// KvStore: nobody reads either before a barrier.
class FillRope : public RowOp {
 public:
  explicit FillRope(int table) : table_(table) {}
  Slots slots() const override { return {}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int table_;
};

class RmsNorm : public RowOp {
 public:
  RmsNorm(int in, std::vector<float> weight, float eps, int out) : in_(in), weight_(std::move(weight)), eps_(eps), out_(out) {}
  Slots slots() const override { return {{in_}, out_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int in_;
  std::vector<float> weight_;
  float eps_;
  int out_;
};

// Norm of every head of a row by itself, in place.
class HeadNorm : public RowOp {
 public:
  HeadNorm(int slot, std::vector<float> weight, float eps, int heads) : slot_(slot), weight_(std::move(weight)), eps_(eps), heads_(heads) {}
  Slots slots() const override { return {{slot_}, slot_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int slot_;
  std::vector<float> weight_;  // [head_dim]
  float eps_;
  int heads_;
};

class Rope : public RowOp {
 public:
  Rope(int slot, int heads, int head_dim, int table) : slot_(slot), heads_(heads), head_dim_(head_dim), table_(table) {}
  Slots slots() const override { return {{slot_}, slot_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int slot_, heads_, head_dim_, table_;
};

class KvStore : public RowOp {
 public:
  KvStore(int layer, int k, int v) : layer_(layer), k_(k), v_(v) {}
  Slots slots() const override { return {{k_, v_}}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int layer_, k_, v_;
};

// The 8-bit copy of a slot.
class Quantize : public RowOp {
 public:
  explicit Quantize(int in) : in_(in) {}
  Slots slots() const override { return {{in_}, -1, in_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int in_;
};

enum class Activation : uint8_t { silu, gelu_tanh };

// gate = act(gate) * up, for some columns of rows [begin, end)
void multiply_gated(const Step& step, Activation act, FloatRows& gate, FloatRows& up, int begin, int end, int column, int columns);

class GatedMultiply : public RowOp {
 public:
  GatedMultiply(Activation act, int gate, int up) : act_(act), gate_(gate), up_(up) {}
  Slots slots() const override { return {{gate_, up_}, gate_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  Activation act_;
  int gate_, up_;
};

// out[r] = in[token of wanted row r]
class SelectRows : public RowOp {
 public:
  SelectRows(int in, int out) : in_(in), out_(out) {}
  Slots slots() const override { return {{in_}, out_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int in_, out_;
};

// out = a + b
class Add : public RowOp {
 public:
  Add(int a, int b, int out) : a_(a), b_(b), out_(out) {}
  Slots slots() const override { return {{a_, b_}, out_}; }
  void run(const Step& step, const SlotView& view, int begin, int end) const override;

 private:
  int a_, b_, out_;
};

}  // namespace setpoint
