// The paged key/value cache: one pool of blocks per group of layers, allocated
// once.
#pragma once
#include <atomic>
#include <deque>
#include <thread>
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
  ~KvCache();
  KvCache(const KvCache&) = delete;

  // Both return the new index and throw std::invalid_argument on absurd sizes,
  // std::bad_alloc without memory.
  int add_group(int num_blocks, int window);
  int add_layer(int group, int kv_heads, int head_dim);
  // Commits the first huge page of every layer's keys and values, and from then on, in a thread, what lies ahead of the
  // blocks in use: first touches take milliseconds a huge page on a virtual machine, better not in a request. Low block
  // ids are handed out first. Called when all layers are there.
  void begin_committing();
  // Blocks up to this one are in use. Costs two loads as long as enough is committed ahead of it.
  void note_use(int group, int highest_block);

  const std::vector<KvGroup>& groups() const { return groups_; }
  int group_of(int layer) const { return layers_.at(static_cast<size_t>(layer)).group; }
  const KvView& view(int layer) const { return layers_.at(static_cast<size_t>(layer)).view; }
  int window_of(int layer) const { return groups_[static_cast<size_t>(group_of(layer))].window; }
  size_t bytes() const;

 private:
  struct Layer {
    int group = 0;
    KvView view;
    MappedArray<uint8_t> k, v;
    size_t committed = 0;  // bytes of each; the committing thread's own
  };
  struct Use {
    std::atomic<int> highest_block{0};
    std::atomic<int> next_work{0};  // the highest block that asks for more
  };
  void commit_ahead();
  bool commit_one_page();  // of each layer that needs it; false: none did
  size_t block_bytes(const Layer& layer) const;
  size_t runway(const Layer& layer) const;  // bytes that shall be committed ahead of those in use

  KvFormat format_;
  std::vector<KvGroup> groups_;
  std::vector<Layer> layers_;
  std::deque<Use> uses_;  // of the groups
  std::atomic<unsigned> calls_{0};
  std::atomic<bool> ends_{false};
  std::thread committer_;
};

}  // namespace setpoint
