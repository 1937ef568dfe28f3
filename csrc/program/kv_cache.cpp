#include "program/kv_cache.h"

#include <stdexcept>

#include "kernels/attention.h"

namespace setpoint {

int KvCache::add_group(int num_blocks, int window) {
  if (num_blocks < 1 || window < 0) throw std::invalid_argument("a KV group needs at least one block and a window >= 0");
  groups_.push_back({num_blocks, window});
  return static_cast<int>(groups_.size()) - 1;
}

int KvCache::add_layer(int group, int kv_heads, int head_dim) {
  if (group < 0 || static_cast<size_t>(group) >= groups_.size()) throw std::invalid_argument("no such KV group");
  if (kv_heads < 1 || head_dim < 1 || kv_heads > 65536 || head_dim > 65536) throw std::invalid_argument("bad KV layer shape");
  const size_t pages = static_cast<size_t>(groups_[static_cast<size_t>(group)].num_blocks) * static_cast<size_t>(kv_heads);
  Layer layer;
  layer.group = group;
  layer.k = MappedArray<uint8_t>(pages * kv_page_bytes(format_, head_dim));
  layer.v = MappedArray<uint8_t>(pages * kv_page_bytes(format_, head_dim));
  layer.view = {format_, kv_heads, head_dim, layer.k.data(), layer.v.data()};
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

void KvCache::commit_first_pages() {
  for (Layer& layer : layers_) layer.k[0] = layer.v[0] = 0;
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Layer& layer : layers_) total += layer.k.size() + layer.v.size();
  return total;
}

}  // namespace setpoint
