#include "program/kv_cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/attention_codes.h"

namespace setpoint {

int KvCache::add_group(int num_blocks, int window) {
  if (num_blocks < 1 || window < 0) throw std::invalid_argument("a KV group needs at least one block and a window >= 0");
  groups_.push_back({num_blocks, window});
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
  layer.committed = kHugePage;  // by the first step, if not before
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

void KvCache::commit_first_pages() {
  for (Layer& layer : layers_) layer.k[0] = layer.v[0] = 0;
}

void KvCache::commit_ahead(int group, int highest_block) {
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    const size_t size = layer.k.size();
    if (layer.group != group || layer.committed >= size) continue;
    const size_t block_bytes = static_cast<size_t>(layer.view.kv_heads) * kv_page_bytes(format_, layer.view.head_dim);
    const size_t used = (static_cast<size_t>(highest_block) + 1) * block_bytes;
    const size_t ahead = kHugePage - kHugePage * i / layers_.size();
    const size_t wanted = std::min((used + ahead) / kHugePage * kHugePage + kHugePage, size);
    if (wanted <= layer.committed) continue;
    commit_memory(layer.k.data() + layer.committed, wanted - layer.committed);
    commit_memory(layer.v.data() + layer.committed, wanted - layer.committed);
    layer.committed = wanted;
  }
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (const Layer& layer : layers_) total += layer.k.size() + layer.v.size();
  return total;
}

}  // namespace setpoint
