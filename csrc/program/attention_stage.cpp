#include "program/attention_stage.h"

#include <algorithm>

#include "kernels/attention.h"

namespace setpoint {

namespace {

constexpr size_t kMaxPartialFloats = size_t{4} << 20;
constexpr int kItemsPerThread = 8;  // at least, where the work can be cut so finely: what the slowest thread may lag behind

}  // namespace

// Room for the longest context of as many single rows as are ever cut, within reason: a tile that finds none is not cut by
// splits.
size_t AttentionStage::partial_floats(const KvView& kv, int heads, int max_model_len, int threads) {
  const size_t splits = (static_cast<size_t>(max_model_len) + kSplitTokens - 1) / kSplitTokens;
  const size_t rows = static_cast<size_t>(kItemsPerThread * threads);
  return std::min(kMaxPartialFloats, rows * static_cast<size_t>(heads) * splits * static_cast<size_t>(kv.head_dim + 2));
}

size_t AttentionStage::scratch_floats(const KvView& kv, int heads) {
  return std::max(attention_scratch_floats(1, heads, kv.head_dim),
                  attention_scratch_floats(kAttentionTileRows, heads / kv.kv_heads, kv.head_dim));
}

void AttentionStage::reserve(const KvView& kv, const Limits& limits, int threads) {
  const size_t tiles = static_cast<size_t>(limits.max_tokens / kAttentionTileRows + limits.max_entries);
  const size_t whole = tiles * static_cast<size_t>(kv.kv_heads);
  const size_t entry = static_cast<size_t>(heads_ / kv.kv_heads) * static_cast<size_t>(kv.head_dim + 2);
  items_.reserve(whole + partial_floats(kv, heads_, limits.max_model_len, threads) / entry);
  merges_.reserve(tiles);
  runs_ = std::vector<Run>(static_cast<size_t>(threads));
}

AttentionStage::Range AttentionStage::splits_of(const Step& step, const Batch::Tile& tile) const {
  const int window = step.kv.window_of(layer_);
  const int first = window == 0 ? 0 : std::max(0, tile.position - window + 1);
  return {first / kSplitTokens, (tile.position + tile.rows - 1) / kSplitTokens + 1};
}

// What a tile costs for one kv head: every row passes over the blocks once they are in cache.
long AttentionStage::cost_of(const Step& step, const Batch::Tile& tile) const {
  const int window = step.kv.window_of(layer_);
  const int first = window == 0 ? 0 : std::max(0, tile.position - window + 1);
  return static_cast<long>((tile.position + tile.rows - 1) / kBlockTokens - first / kBlockTokens + 1) * (tile.rows + 1);
}

void AttentionStage::prepare(const Step& step) {
  const auto tiles = step.batch.tiles();
  total_ = 0;
  for (const Batch::Tile& tile : tiles) total_ += cost_of(step, tile) * step.kv.view(layer_).kv_heads;
  parts_ = step.pool.size() == 1 ? 1 : kItemsPerThread * step.pool.size();
  partials_used_ = 0;
  items_.clear();
  merges_.clear();
  // Late tiles see most tokens: first, so that the short ones even out the end.
  for (int tile = static_cast<int>(tiles.size()) - 1; tile >= 0; --tile) cut(step, tile);
  for (size_t run = 0; run < runs_.size(); ++run) {
    runs_[run].next.store(items_.size() * run / runs_.size(), std::memory_order_relaxed);
    runs_[run].end = items_.size() * (run + 1) / runs_.size();
  }
}

// Heads stay together for a single row, which then reads memory in order; several rows use what they read more than once,
// and do so in cache head by head.
void AttentionStage::cut(const Step& step, int index) {
  const KvView& kv = step.kv.view(layer_);
  const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(index)];
  const Range splits = splits_of(step, tile);
  const long cost = cost_of(step, tile) * kv.kv_heads;
  const size_t entry = static_cast<size_t>(kv.head_dim) + 2;
  int splits_each = splits.size();
  float* partial = nullptr;
  if (!small(cost, kv.kv_heads) && splits.size() > 1) {
    partial = take_partials(step, static_cast<size_t>(tile.rows * heads_) * static_cast<size_t>(splits.size()) * entry);
    if (partial != nullptr) {
      merges_.push_back({index, splits.size(), partial});
      splits_each = 1;
    }
  }
  const int heads_each = tile.rows == 1 && small(cost, splits.size() / splits_each) ? kv.kv_heads : 1;
  for (int split = splits.begin; split < splits.end; split += splits_each)
    for (int head = 0; head < kv.kv_heads; head += heads_each) {
      Item item{index, {head, head + heads_each}, {split, split + splits_each}, nullptr};
      const size_t first = static_cast<size_t>(head * (heads_ / kv.kv_heads) * splits.size() + (split - splits.begin));
      if (partial != nullptr) item.partial = partial + first * entry;
      items_.push_back(item);
    }
}

// Null when there is not enough left.
float* AttentionStage::take_partials(const Step& step, size_t floats) {
  if (floats > step.work.partials.size() - partials_used_) return nullptr;
  partials_used_ += floats;
  return step.work.partials.data() + partials_used_ - floats;
}

void AttentionStage::run(const Step& step, int thread) {
  for (size_t i = 0; i < runs_.size(); ++i) {
    Run& run = runs_[(static_cast<size_t>(thread) + i) % runs_.size()];
    for (size_t item = run.next.fetch_add(1, std::memory_order_relaxed); item < run.end;
         item = run.next.fetch_add(1, std::memory_order_relaxed))
      run_item(step, items_[item], item + 1 < run.end ? &items_[item + 1] : nullptr, thread);
  }
  if (merges_.empty()) return;
  step.pool.barrier();
  merge(step, thread);
}

std::span<const int32_t> AttentionStage::first_pages(const Step& step, const Item& item) const {
  const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(item.tile)];
  const int window = step.kv.window_of(layer_);
  const int token = std::max(item.splits.begin * kSplitTokens, window == 0 ? 0 : tile.position - window + 1);
  const int first = token / kPageTokens, end = tile.position / kPageTokens + 1;
  return {step.batch.block_table(step.kv.group_of(layer_), tile.entry) + first,
          static_cast<size_t>(std::min(end - first, kBlockTokens / kPageTokens))};
}

void AttentionStage::run_item(const Step& step, const Item& item, const Item* next, int thread) const {
  FloatRows& q = step.work.values(q_);
  FloatRows& out = step.work.values(out_);
  const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(item.tile)];
  AttentionArgs args;
  args.kv = step.kv.view(layer_);
  args.block_table = step.batch.block_table(step.kv.group_of(layer_), tile.entry);
  args.position = tile.position;
  args.rows = tile.rows;
  args.kv_head_begin = item.heads.begin;
  args.kv_head_end = item.heads.end;
  args.group = heads_ / args.kv.kv_heads;
  args.scale = scale_;
  args.window = step.kv.window_of(layer_);
  args.q = q.row(tile.begin);
  args.q_stride = q.stride;
  args.out = out.row(tile.begin);
  args.out_stride = out.stride;
  args.split_begin = item.splits.begin;
  args.split_end = item.splits.end;
  if (next != nullptr && tile.rows == 1 && step.batch.tiles()[static_cast<size_t>(next->tile)].rows == 1 && next->heads == item.heads) {
    const auto pages = first_pages(step, *next);
    args.next_pages = pages.data();
    args.num_next_pages = static_cast<int>(pages.size());
  }
  args.partial = item.partial;
  if (item.partial != nullptr) {
    args.partial_splits = splits_of(step, tile).size();
    args.partial_row = static_cast<size_t>(heads_ * args.partial_splits) * static_cast<size_t>(args.kv.head_dim + 2);
  }
  args.scratch = step.work.attention_scratch[static_cast<size_t>(thread)].data();
  step.kernels.attention(args);
}

void AttentionStage::merge(const Step& step, int thread) const {
  const KvView& kv = step.kv.view(layer_);
  FloatRows& out = step.work.values(out_);
  const int group = heads_ / kv.kv_heads;
  int turn = 0;
  for (const Merge& merge : merges_) {
    const Batch::Tile& tile = step.batch.tiles()[static_cast<size_t>(merge.tile)];
    for (int unit = 0; unit < tile.rows * kv.kv_heads; ++unit) {
      if (turn++ % step.pool.team() != thread) continue;
      const int row = unit / kv.kv_heads, head = unit % kv.kv_heads * group;
      const float* partial =
          merge.partial + static_cast<size_t>((row * heads_ + head) * merge.splits) * static_cast<size_t>(kv.head_dim + 2);
      step.kernels.attention_merge(partial, 1, group, merge.splits, kv.head_dim, out.row(tile.begin + row) + head * kv.head_dim,
                                   out.stride);
    }
  }
}

}  // namespace setpoint
