// Attention of one layer, shared out in items: a tile of query rows, some kv heads, some 512-token splits of the context.
// Every thread takes a run of items, whose blocks follow each other in memory, then what is left of the others' runs. Tiles that are more
// than their share of the step's work are cut by heads, then by splits, whose partial results are merged afterwards: the same bits either
// way.
#pragma once
#include <atomic>
#include <span>

#include "program/stage.h"

namespace setpoint {

class AttentionStage : public Stage {
 public:
  AttentionStage(int layer, int heads, float scale, int q, int out) : layer_(layer), heads_(heads), scale_(scale), q_(q), out_(out) {}

  StageKind kind() const override { return StageKind::attention; }
  void prepare(const Step& step) override;
  void run(const Step& step, int thread) override;

  // Makes room for the items of any step, which then allocates nothing. Before the first one.
  void reserve(const KvView& kv, const Limits& limits, int threads);

  // Floats a program must reserve for this stage in Workspace::partials, and per thread in attention_scratch.
  static size_t partial_floats(const KvView& kv, int heads, int max_model_len, int threads);
  static size_t scratch_floats(const KvView& kv, int heads);

 private:
  struct Range {
    int begin = 0, end = 0;
    int size() const { return end - begin; }
    bool operator==(const Range&) const = default;
  };
  struct Item {
    int tile = 0;
    Range heads;   // kv heads
    Range splits;  // absolute
    float* partial = nullptr;
  };
  struct Merge {  // of one tile
    int tile = 0;
    int splits = 0;
    const float* partial = nullptr;  // [rows][heads_][splits][head_dim + 2]
  };

  struct alignas(64) Run {
    std::atomic<size_t> next{0};
    size_t end = 0;
  };

  Range splits_of(const Step& step, const Batch::Tile& tile) const;
  long cost_of(const Step& step, const Batch::Tile& tile) const;
  // Whether `cost` in `pieces` is no more than a part of the step each.
  bool small(long cost, long pieces) const { return cost * parts_ <= total_ * pieces; }
  void cut(const Step& step, int index);
  float* take_partials(const Step& step, size_t floats);
  // `next` is what the same thread is likely to run after it, or null.
  void run_item(const Step& step, const Item& item, const Item* next, int thread) const;
  // The pages that an item of a single row reads first.
  std::span<const int32_t> first_pages(const Step& step, const Item& item) const;
  void merge(const Step& step, int thread) const;

  int layer_, heads_;
  float scale_;
  int q_, out_;
  long total_ = 0;  // cost of the step, all kv heads
  int parts_ = 1;
  size_t partials_used_ = 0;
  std::vector<Item> items_;
  std::vector<Merge> merges_;
  std::vector<Run> runs_;  // per thread
};

}  // namespace setpoint
