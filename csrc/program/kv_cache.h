// The paged key/value cache: one pool of blocks per group of layers, allocated once.
//
// A pool is a row of spans: [span of kSpanBlocks blocks][layer][keys, values][block][head]. So what some tokens take lies
// in few huge pages, of which every one costs a virtual machine up to 5 ms at its first touch, while a layer still reads
// long runs.
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

  // Both return the new index and throw std::invalid_argument on absurd sizes.
  int add_group(int num_blocks, int window);
  int add_layer(int group, int kv_heads, int head_dim);
  // Once all layers are there; from then on views are complete. Throws std::bad_alloc.
  void allocate();
  // Commits the memory of the first spans and from then on, in a thread, what lies ahead of the blocks in use, so that
  // requests seldom meet a first touch. Low block ids are handed out first.
  void begin_committing();
  // Blocks up to this one are in use. Costs two loads as long as enough is committed ahead of it.
  void note_use(int group, int highest_block);

  const std::vector<KvGroup>& groups() const { return groups_; }
  int group_of(int layer) const { return layers_.at(static_cast<size_t>(layer)).group; }
  const KvView& view(int layer) const { return layers_.at(static_cast<size_t>(layer)).view; }
  int window_of(int layer) const { return groups_[static_cast<size_t>(group_of(layer))].window; }
  size_t bytes() const;
  // What a block holds over all layers of its group, as one record: [layer][keys, values][head] pages. Not while a step runs.
  // All throw std::invalid_argument for what is not there, or of another size.
  size_t block_bytes(int group) const;
  void read_block(int group, int block, uint8_t* out, size_t size) const;
  void write_block(int group, int block, const uint8_t* in, size_t size);

 private:
  struct Layer {
    int group = 0;
    KvView view;
    size_t keys_at = 0, values_at = 0;  // bytes into a span
  };
  struct Pool {  // of a group
    size_t span_bytes = 0;
    MappedArray<uint8_t> memory;
    size_t committed = 0;                // the committing thread's own, once it runs
    std::atomic<int> highest_block{-1};  // in use
    std::atomic<int> next_work{0};       // the highest block that asks for more
  };
  void check_block(int group, int block, size_t size) const;
  void commit_ahead();
  bool commit_one_page();                        // of each pool that needs it; false: none did
  static size_t wanted_bytes(const Pool& pool);  // committed, for what is in use

  KvFormat format_;
  std::vector<KvGroup> groups_;
  std::deque<Pool> pools_;  // of the groups
  std::vector<Layer> layers_;
  std::atomic<unsigned> calls_{0};
  std::atomic<bool> ends_{false};
  std::thread committer_;
};

}  // namespace setpoint
