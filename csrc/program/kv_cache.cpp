#include "program/kv_cache.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels/attention_codes.h"

namespace setpoint {

namespace {

constexpr int kFirstSpans = 2;
constexpr size_t kRunwayBytes = size_t{256} << 20;  // committed ahead of the blocks in use

void run_in_background() {
#if defined(__linux__)
  setpriority(PRIO_PROCESS, 0, 19);  // of this thread alone, there
#endif
}

}  // namespace

int KvCache::add_group(int num_blocks, int window) {
  if (num_blocks < 1 || window < 0) throw std::invalid_argument("a KV group needs at least one block and a window >= 0");
  groups_.push_back({num_blocks, window});
  pools_.emplace_back();
  return static_cast<int>(groups_.size()) - 1;
}

int KvCache::add_layer(int group, int kv_heads, int head_dim) {
  if (group < 0 || static_cast<size_t>(group) >= groups_.size()) throw std::invalid_argument("no such KV group");
  if (kv_heads < 1 || head_dim < 1 || kv_heads > 65536 || head_dim > 65536) throw std::invalid_argument("bad KV layer shape");
  if (format_ == KvFormat::s16 && (head_dim % 2 != 0 || head_dim > kMostCodeHeadDim))
    throw std::invalid_argument("the s16 KV cache needs an even head_dim of at most " + std::to_string(kMostCodeHeadDim) +
                                "; use --kv-cache-dtype f16");
  Layer layer;
  layer.group = group;
  layer.view = {format_, kv_heads, head_dim, nullptr, nullptr, 0};
  size_t& span_bytes = pools_[static_cast<size_t>(group)].span_bytes;
  layer.keys_at = span_bytes;
  layer.values_at = span_bytes + kv_span_bytes(format_, kv_heads, head_dim);
  span_bytes = layer.values_at + kv_span_bytes(format_, kv_heads, head_dim);
  layers_.push_back(layer);
  return static_cast<int>(layers_.size()) - 1;
}

void KvCache::allocate() {
  for (size_t group = 0; group < groups_.size(); ++group) {
    Pool& pool = pools_[group];
    const size_t spans = (static_cast<size_t>(groups_[group].num_blocks) + kSpanBlocks - 1) / kSpanBlocks;
    if (pool.span_bytes > SIZE_MAX / 2 / spans) throw std::bad_alloc();
    pool.memory = MappedArray<uint8_t>(spans * pool.span_bytes);
  }
  for (Layer& layer : layers_) {
    Pool& pool = pools_[static_cast<size_t>(layer.group)];
    layer.view.k = pool.memory.data() + layer.keys_at;
    layer.view.v = pool.memory.data() + layer.values_at;
    layer.view.span_stride = pool.span_bytes;
  }
}

void KvCache::begin_committing() {
  if (committer_.joinable()) return;
  for (Pool& pool : pools_) {
    pool.committed = std::min(round_up(kFirstSpans * pool.span_bytes, kHugePage), pool.memory.size());
    for (size_t at = 0; at < pool.committed; at += kHugePage) pool.memory[at] = 0;
  }
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
  Pool& pool = pools_[static_cast<size_t>(group)];
  if (highest_block <= pool.highest_block.load(std::memory_order_relaxed)) return;
  pool.highest_block.store(highest_block);
  if (highest_block < pool.next_work.load()) return;
  calls_.fetch_add(1);
  calls_.notify_one();
}

size_t KvCache::wanted_bytes(const Pool& pool) {
  const size_t used = (static_cast<size_t>(pool.highest_block + 1) / kSpanBlocks + 1) * pool.span_bytes;
  return std::min(used + kRunwayBytes, pool.memory.size());
}

void KvCache::commit_ahead() {
  run_in_background();
  calls_.wait(0);  // for the first step: a start has better things to do
  while (true) {
    const unsigned call = calls_;
    while (!ends_ && commit_one_page()) {
    }
    if (ends_) return;
    for (Pool& pool : pools_) {
      const size_t spans = pool.committed <= kRunwayBytes ? 0 : (pool.committed - kRunwayBytes) / pool.span_bytes;
      pool.next_work = pool.committed >= pool.memory.size() ? std::numeric_limits<int>::max() : static_cast<int>(spans * kSpanBlocks);
    }
    calls_.wait(call);
  }
}

bool KvCache::commit_one_page() {
  bool did = false;
  for (Pool& pool : pools_) {
    if (pool.committed >= wanted_bytes(pool)) continue;
    const size_t bytes = std::min(kHugePage, pool.memory.size() - pool.committed);
    commit_memory(pool.memory.data() + pool.committed, bytes);
    pool.committed += bytes;
    did = true;
  }
  return did;
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Pool& pool : pools_) total += pool.memory.size();
  return total;
}

size_t KvCache::block_bytes(int group) const {
  if (group < 0 || static_cast<size_t>(group) >= groups_.size()) throw std::invalid_argument("no such KV group");
  return pools_[static_cast<size_t>(group)].span_bytes / kSpanBlocks;
}

void KvCache::check_block(int group, int block, size_t size) const {
  if (size != block_bytes(group)) throw std::invalid_argument("a KV block of another size");
  if (block < 0 || block >= groups_[static_cast<size_t>(group)].num_blocks) throw std::invalid_argument("no such KV block");
  if (pools_[static_cast<size_t>(group)].memory.size() == 0) throw std::invalid_argument("the KV cache has no memory yet");
}

void KvCache::read_block(int group, int block, uint8_t* out, size_t size) const {
  check_block(group, block, size);
  for (const Layer& layer : layers_) {
    if (layer.group != group) continue;
    const size_t bytes = kv_span_bytes(format_, layer.view.kv_heads, layer.view.head_dim) / kSpanBlocks;
    const size_t at = page_offset(layer.view, block, 0);
    for (const uint8_t* pages : {layer.view.k, layer.view.v}) {
      std::memcpy(out, pages + at, bytes);
      out += bytes;
    }
  }
}

void KvCache::write_block(int group, int block, const uint8_t* in, size_t size) {
  check_block(group, block, size);
  note_use(group, block);
  for (const Layer& layer : layers_) {
    if (layer.group != group) continue;
    const size_t bytes = kv_span_bytes(format_, layer.view.kv_heads, layer.view.head_dim) / kSpanBlocks;
    const size_t at = page_offset(layer.view, block, 0);
    for (uint8_t* pages : {layer.view.k, layer.view.v}) {
      std::memcpy(pages + at, in, bytes);
      in += bytes;
    }
  }
}

}  // namespace setpoint
