// Attention of one layer. Units of work are (tile of query rows, kv head),
// taken from a counter; when those are too few for the threads and the context
// is long, also 512-token splits, merged afterwards: the same bits either way.
#pragma once
#include <atomic>

#include "program/stage.h"

namespace setpoint {

class AttentionStage : public Stage {
 public:
  AttentionStage(int layer, int heads, float scale, int q, int out) : layer_(layer), heads_(heads), scale_(scale), q_(q), out_(out) {}

  StageKind kind() const override { return StageKind::attention; }
  void prepare(const Step& step) override;
  void run(const Step& step, int thread) override;

  // Floats a program must reserve in Workspace::partials for this stage, and
  // per thread in split_scratch.
  static size_t partial_floats(const KvView& kv, int heads, int max_model_len, int threads);
  static size_t split_floats(const KvView& kv, int heads);

 private:
  struct Splits {
    int begin = 0, end = 0;
  };
  Splits splits_of(const Step& step, const Batch::Tile& tile) const;
  AttentionArgs arguments(const Step& step, const Batch::Tile& tile, int kv_head, int thread) const;
  float* partials_of(const Step& step, int unit) const;
  void run_split(const Step& step, int unit, int split, int thread) const;
  void merge(const Step& step, int unit) const;

  int layer_, heads_;
  float scale_;
  int q_, out_;
  int units_ = 0;       // tiles x kv heads
  int max_splits_ = 1;  // 1 = every unit walks its splits itself
  int tile_rows_ = 0;   // of the largest tile, when splits are shared out
  alignas(64) std::atomic<int> next_{0};
};

}  // namespace setpoint
