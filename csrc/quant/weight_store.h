// All packed matrices of a model in one piece of memory, in huge pages: places are given out first, without touching
// anything, then everything is packed, or taken from a file, by several threads while others do other things.
#pragma once
#include "core/memory.h"
#include "quant/packed_matrix.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace setpoint {

class WeightStore {
 public:
  // Room for `capacity` bytes of matrices; only what is written takes memory.
  explicit WeightStore(size_t capacity) : storage_(std::make_shared<MappedArray<uint8_t>>(capacity)) {}
  // Room that a matrix takes at most. Throws std::invalid_argument as packed_shape does.
  static size_t room(std::span<const RawRows> sources, int64_t cols, bool as_float);

  // A place for the matrix; its data are zeros for now. The sources must stay where they are until it is packed.
  // Throws std::invalid_argument, std::length_error when the room is used up.
  PackedMatrix add(std::vector<RawRows> sources, int64_t cols, bool as_float);

  // Bytes for what is derived from the matrices, filled by whoever asks and kept in the image. `version` tells images
  // apart whose contents are made in different ways. Throws std::length_error.
  uint8_t* add_bytes(size_t bytes, uint32_t version);

  std::span<const uint8_t> image() const { return {storage_->data(), used_}; }
  // Shapes and places of all matrices and the version of the packed layout: images of equal descriptions can be
  // exchanged when they come from equal sources.
  std::string description() const;

  // Into zeros; forgets the sources.
  void pack(int num_threads);

  static constexpr size_t kChunkBytes = size_t{2} << 20;
  size_t num_chunks() const { return (used_ + kChunkBytes - 1) / kChunkBytes; }
  // A 64-bit checksum per chunk of the image: finds damage, not malice.
  std::vector<uint64_t> checksums(int num_threads) const;
  // Takes the image from a file: mapped where that is possible, so that its pages are shared and cost no new memory,
  // else read. `offset` is a multiple of kChunkBytes. False, and zeros again, when the file is too short or a chunk
  // differs from its checksum; forgets the sources otherwise. The file must never be shortened afterwards.
  bool load(int file, uint64_t offset, std::span<const uint64_t> checksums, int num_threads);

  // Small pages of a mapped file cost a decoding step 13-25 %. Moves slice `index` of the image into huge pages, while
  // others may read it. Throws std::bad_alloc.
  void move_to_huge_pages(size_t slice);
  size_t num_slices() const { return is_mapped_ ? (used_ + kSliceBytes - 1) / kSliceBytes : 0; }

 private:
  struct Job {
    PackedWeight shape;  // of a matrix; for other bytes k is their version
    size_t offset;
    std::vector<RawRows> sources;
  };

  static constexpr size_t kSliceBytes = 4 * kChunkBytes;

  uint8_t* take(size_t bytes);
  size_t chunk_bytes(size_t chunk) const { return std::min(kChunkBytes, used_ - chunk * kChunkBytes); }

  std::shared_ptr<MappedArray<uint8_t>> storage_;
  size_t used_ = 0;
  bool is_mapped_ = false;
  std::vector<Job> jobs_;
};

}  // namespace setpoint
