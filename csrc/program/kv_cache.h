// The paged key/value cache: one pool of blocks per group of layers, allocated
// once.
#pragma once
#include <vector>

#include "core/memory.h"
#include "kernels/kernels.h"

namespace setpoint {

// Layers of a group share block ids. A window of 0 means that every earlier
// token is visible.
struct KvGroup {
  int num_blocks = 0;
  int window = 0;
};

class KvCache {
 public:
  explicit KvCache(KvFormat format) : format_(format) {}

  // Both return the new index and throw std::invalid_argument on absurd sizes,
  // std::bad_alloc without memory.
  int add_group(int num_blocks, int window);
  int add_layer(int group, int kv_heads, int head_dim);
  // The first huge page of every layer's keys and values: committing them takes up to 0.2 s on a virtual machine, better
  // not in the first request. Low block ids are handed out first.
  void commit_first_pages();

  const std::vector<KvGroup>& groups() const { return groups_; }
  int group_of(int layer) const { return layers_.at(static_cast<size_t>(layer)).group; }
  const KvView& view(int layer) const { return layers_.at(static_cast<size_t>(layer)).view; }
  int window_of(int layer) const { return groups_[static_cast<size_t>(group_of(layer))].window; }
  size_t bytes() const;

  // Commits the huge page after the one that `highest_block` lies in, for a part of the group's layers that grows with the
  // block's place in it: what all layers need at the same block is never first touched in one step.
  void commit_ahead(int group, int highest_block);

 private:
  struct Layer {
    int group = 0;
    KvView view;
    MappedArray<uint8_t> k, v;
    size_t committed = 0;  // bytes of each
  };
  KvFormat format_;
  std::vector<KvGroup> groups_;
  std::vector<Layer> layers_;
};

}  // namespace setpoint
