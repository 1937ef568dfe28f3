// The ops that work row by row. Slots are indices into Workspace::slots.
#pragma once
#include <cstdint>
#include <vector>

#include "program/stage.h"
#include "quant/block_format.h"

namespace setpoint {

// out[row] = scale * table[token of row]; the table is a checkpoint's raw
// matrix, decoded row by row.
class Embed : public RowOp {
 public:
  Embed(const BlockFormat& format, const uint8_t* table, size_t row_bytes, float scale, int out)
      : format_(format), table_(table), row_bytes_(row_bytes), scale_(scale), out_(out) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  const BlockFormat& format_;
  const uint8_t* table_;
  size_t row_bytes_;
  float scale_;
  int out_;
};

// cos and sin for the rows' positions.
class FillRope : public RowOp {
 public:
  explicit FillRope(int table) : table_(table) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int table_;
};

class RmsNorm : public RowOp {
 public:
  RmsNorm(int in, std::vector<float> weight, float eps, int out) : in_(in), weight_(std::move(weight)), eps_(eps), out_(out) {}
  void run(const Step& step, int begin, int end) const override;

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
  void run(const Step& step, int begin, int end) const override;

 private:
  int slot_;
  std::vector<float> weight_;  // [head_dim]
  float eps_;
  int heads_;
};

class Rope : public RowOp {
 public:
  Rope(int slot, int heads, int head_dim, int table) : slot_(slot), heads_(heads), head_dim_(head_dim), table_(table) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int slot_, heads_, head_dim_, table_;
};

class KvStore : public RowOp {
 public:
  KvStore(int layer, int k, int v) : layer_(layer), k_(k), v_(v) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int layer_, k_, v_;
};

class Quantize : public RowOp {
 public:
  Quantize(int in, int k) : in_(in), k_(k) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int in_, k_;
};

enum class Activation : uint8_t { silu, gelu_tanh };

// gate = act(gate) * up
class GatedMultiply : public RowOp {
 public:
  GatedMultiply(Activation act, int gate, int up) : act_(act), gate_(gate), up_(up) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  Activation act_;
  int gate_, up_;
};

// out[r] = in[token of wanted row r]
class SelectRows : public RowOp {
 public:
  SelectRows(int in, int out) : in_(in), out_(out) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int in_, out_;
};

// out += in
class Add : public RowOp {
 public:
  Add(int in, int out) : in_(in), out_(out) {}
  void run(const Step& step, int begin, int end) const override;

 private:
  int in_, out_;
};

}  // namespace setpoint
