#include "program/attention_stage.h"

#include <algorithm>

namespace setpoint {

namespace {

constexpr size_t kMaxPartialFloats = size_t{4} << 20;

}  // namespace

// Room for decode (one row a tile) at the longest context for every unit that
// may be split, within reason: a step that needs more walks its splits one
// after another.
size_t AttentionStage::partial_floats(const KvView& kv, int heads, int max_model_len, int threads) {
  const size_t splits = (static_cast<size_t>(max_model_len) + kSplitTokens - 1) / kSplitTokens;
  const size_t group = static_cast<size_t>(heads / kv.kv_heads);
  return std::min(kMaxPartialFloats, 2 * static_cast<size_t>(threads) * group * splits * static_cast<size_t>(kv.head_dim + 2));
}

size_t AttentionStage::split_floats(const KvView& kv, int heads) {
  return static_cast<size_t>(kAttentionTileRows) * static_cast<size_t>(heads / kv.kv_heads) * static_cast<size_t>(kv.head_dim + 2);
}

AttentionStage::Splits AttentionStage::splits_of(const Step& step, const Batch::Tile& tile) const {
  const int window = step.kv.window_of(layer_);
  const int first = window == 0 ? 0 : std::max(0, tile.position - window + 1);
  return {first / kSplitTokens, (tile.position + tile.rows - 1) / kSplitTokens + 1};
}

void AttentionStage::prepare(const Step& step) {
  const KvView& kv = step.kv.view(layer_);
  units_ = static_cast<int>(step.batch.tiles().size()) * kv.kv_heads;
  max_splits_ = 1;
  tile_rows_ = 0;
  next_.store(0, std::memory_order_relaxed);
  if (step.pool.size() == 1 || units_ >= 2 * step.pool.size() || step.batch.last_position() < kSplitTokens) return;
  int splits = 1;
  for (const Batch::Tile& tile : step.batch.tiles()) {
    const Splits range = splits_of(step, tile);
    splits = std::max(splits, range.end - range.begin);
    tile_rows_ = std::max(tile_rows_, tile.rows);
  }
  const size_t floats = static_cast<size_t>(units_) * static_cast<size_t>(tile_rows_) * static_cast<size_t>(heads_ / kv.kv_heads) *
                        static_cast<size_t>(splits) * static_cast<size_t>(kv.head_dim + 2);
  if (floats <= step.work.partials.size()) max_splits_ = splits;
}

AttentionArgs AttentionStage::arguments(const Step& step, const Batch::Tile& tile, int kv_head, int thread) const {
  FloatRows& q = step.work.values(q_);
  FloatRows& out = step.work.values(out_);
  const Splits splits = splits_of(step, tile);
  AttentionArgs args;
  args.kv = step.kv.view(layer_);
  args.block_table = step.batch.block_table(step.kv.group_of(layer_), tile.entry);
  args.position = tile.position;
  args.rows = tile.rows;
  args.kv_head = kv_head;
  args.group = heads_ / args.kv.kv_heads;
  args.scale = scale_;
  args.window = step.kv.window_of(layer_);
  args.q = q.row(tile.begin);
  args.q_stride = q.stride;
  args.out = out.row(tile.begin);
  args.out_stride = out.stride;
  args.split_begin = splits.begin;
  args.split_end = splits.end;
  args.scratch = step.work.attention_scratch[static_cast<size_t>(thread)].data();
  return args;
}

void AttentionStage::run(const Step& step, int thread) {
  const int kv_heads = step.kv.view(layer_).kv_heads;
  const auto tiles = step.batch.tiles();
  if (max_splits_ == 1) {
    for (int unit = next_.fetch_add(1, std::memory_order_relaxed); unit < units_; unit = next_.fetch_add(1, std::memory_order_relaxed)) {
      // Late tiles see most tokens: first, so that the short ones even out the
      // end.
      const Batch::Tile& tile = tiles[tiles.size() - 1 - static_cast<size_t>(unit / kv_heads)];
      step.kernels.attention(arguments(step, tile, unit % kv_heads, thread));
    }
    return;
  }
  const int work = units_ * max_splits_;
  for (int item = next_.fetch_add(1, std::memory_order_relaxed); item < work; item = next_.fetch_add(1, std::memory_order_relaxed))
    run_split(step, item / max_splits_, item % max_splits_, thread);
  step.pool.barrier();
  for (int unit = thread; unit < units_; unit += step.pool.size()) merge(step, unit);
}

// Partials of a unit: [rows][group][its splits][head_dim + 2]
float* AttentionStage::partials_of(const Step& step, int unit) const {
  const KvView& kv = step.kv.view(layer_);
  const size_t unit_floats = static_cast<size_t>(tile_rows_) * static_cast<size_t>(heads_ / kv.kv_heads) *
                             static_cast<size_t>(max_splits_) * static_cast<size_t>(kv.head_dim + 2);
  return step.work.partials.data() + static_cast<size_t>(unit) * unit_floats;
}

void AttentionStage::run_split(const Step& step, int unit, int split, int thread) const {
  const int kv_heads = step.kv.view(layer_).kv_heads;
  const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(unit / kv_heads)];
  AttentionArgs args = arguments(step, tile, unit % kv_heads, thread);
  const int splits = args.split_end - args.split_begin;
  if (split >= splits) return;
  args.split_begin += split;
  args.split_end = args.split_begin + 1;
  args.partial = step.work.split_scratch[static_cast<size_t>(thread)].data();
  step.kernels.attention(args);
  const size_t floats = static_cast<size_t>(args.kv.head_dim) + 2;
  float* target = partials_of(step, unit) + static_cast<size_t>(split) * floats;
  for (int i = 0; i < args.rows * args.group; ++i)
    std::copy_n(args.partial + static_cast<size_t>(i) * floats, floats, target + static_cast<size_t>(i * splits) * floats);
}

void AttentionStage::merge(const Step& step, int unit) const {
  const KvView& kv = step.kv.view(layer_);
  const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(unit / kv.kv_heads)];
  const Splits splits = splits_of(step, tile);
  const int group = heads_ / kv.kv_heads;
  FloatRows& out = step.work.values(out_);
  float* first = out.row(tile.begin) + static_cast<size_t>(unit % kv.kv_heads * group * kv.head_dim);
  step.kernels.attention_merge(partials_of(step, unit), tile.rows, group, splits.end - splits.begin, kv.head_dim, first, out.stride);
}

}  // namespace setpoint
