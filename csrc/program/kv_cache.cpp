#include "program/kv_cache.h"

#include <sys/resource.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/attention_codes.h"

namespace setpoint {

namespace {

constexpr size_t kRunwayBytes = size_t{256} << 20;  // of all keys and values

void run_in_background() {
#if defined(__linux__)
  setpriority(PRIO_PROCESS, 0, 19);  // of this thread alone, there
#endif
}

}  // namespace

int KvCache::add_group(int num_blocks, int window) {
  if (num_blocks < 1 || window < 0) throw std::invalid_argument("a KV group needs at least one block and a window >= 0");
  groups_.push_back({num_blocks, window});
  uses_.emplace_back();
  return static_cast<int>(groups_.size()) - 1;
}

int KvCache::add_layer(int group, int kv_heads, int head_dim) {
  if (group < 0 || static_cast<size_t>(group) >= groups_.size()) throw std::invalid_argument("no such KV group");
  if (kv_heads < 1 || head_dim < 1 || kv_heads > 65536 || head_dim > 65536) throw std::invalid_argument("bad KV layer shape");
  if (format_ == KvFormat::s16 && (head_dim % 2 != 0 || head_dim > kMostCodeHeadDim))
    throw std::invalid_argument("the s16 KV cache needs an even head_dim of at most " + std::to_string(kMostCodeHeadDim) +
                                "; use --kv-cache-dtype f16");
  const size_t pages = static_cast<size_t>(groups_[static_cast<size_t>(group)].num_blocks) * static_cast<size_t>(kv_heads);
  Layer layer;
  layer.group = group;
  layer.k = MappedArray<uint8_t>(pages * kv_page_bytes(format_, head_dim));
  layer.v = MappedArray<uint8_t>(pages * kv_page_bytes(format_, head_dim));
  layer.view = {format_, kv_heads, head_dim, layer.k.data(), layer.v.data()};
  layer.committed = std::min(kHugePage, layer.k.size());  // by the first step, if not before
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

void KvCache::begin_committing() {
  if (committer_.joinable()) return;
  for (Layer& layer : layers_) layer.k[0] = layer.v[0] = 0;
  committer_ = std::thread([this] { commit_ahead(); });
}

KvCache::~KvCache() {
  if (!committer_.joinable()) return;
  ends_ = true;
  calls_.fetch_add(1);
  calls_.notify_one();
  committer_.join();
}

void KvCache::note_use(int group, int highest_block) {
  Use& use = uses_[static_cast<size_t>(group)];
  if (highest_block <= use.highest_block.load(std::memory_order_relaxed)) return;
  use.highest_block.store(highest_block);
  if (highest_block < use.next_work.load()) return;
  calls_.fetch_add(1);
  calls_.notify_one();
}

size_t KvCache::block_bytes(const Layer& layer) const {
  return static_cast<size_t>(layer.view.kv_heads) * kv_page_bytes(format_, layer.view.head_dim);
}

size_t KvCache::runway(const Layer& layer) const {
  return std::max(kHugePage, kRunwayBytes / (2 * layers_.size()) / block_bytes(layer) * block_bytes(layer));
}

void KvCache::commit_ahead() {
  run_in_background();
  while (true) {
    const unsigned call = calls_;
    while (!ends_ && commit_one_page()) {
    }
    if (ends_) return;
    for (Use& use : uses_) use.next_work = std::numeric_limits<int>::max();
    for (const Layer& layer : layers_) {
      if (layer.committed >= layer.k.size()) continue;
      std::atomic<int>& next = uses_[static_cast<size_t>(layer.group)].next_work;
      const size_t ahead = runway(layer);
      next = std::min(next.load(), static_cast<int>(layer.committed < ahead ? 0 : (layer.committed - ahead) / block_bytes(layer)));
    }
    calls_.wait(call);
  }
}

bool KvCache::commit_one_page() {
  bool did = false;
  for (Layer& layer : layers_) {
    const size_t used = (static_cast<size_t>(uses_[static_cast<size_t>(layer.group)].highest_block) + 1) * block_bytes(layer);
    if (layer.committed >= std::min(used + runway(layer), layer.k.size())) continue;
    const size_t bytes = std::min(kHugePage, layer.k.size() - layer.committed);
    commit_memory(layer.k.data() + layer.committed, bytes);
    commit_memory(layer.v.data() + layer.committed, bytes);
    layer.committed += bytes;
    did = true;
    if (ends_) break;
  }
  return did;
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Layer& layer : layers_) total += layer.k.size() + layer.v.size();
  return total;
}

}  // namespace setpoint
