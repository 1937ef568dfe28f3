#include "quant/weight_store.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace setpoint {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPieceBytes = size_t{1} << 20;  // of packed data: what a thread takes at a time

// Calls work(i) for i in [0, count) from several threads, in ascending order of starts.
template <class Work>
void share(size_t count, int num_threads, Work&& work) {
  std::atomic<size_t> next{0};
  auto run = [&] {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::jthread> threads;
  for (int i = 1; i < num_threads && size_t(i) < count; ++i) threads.emplace_back(run);
  run();
}

// Maps the pages of a file's bytes at once instead of by one fault each. Only advice: old kernels refuse it.
void touch_pages(const uint8_t* begin, size_t size) {
#if defined(MADV_POPULATE_READ)
  const size_t page = 4096;
  const auto first = reinterpret_cast<uintptr_t>(begin) / page * page;
  madvise(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(begin) + size - first, MADV_POPULATE_READ);
#endif
}

// Eight independent lanes of multiply and rotate: as fast as memory is read.
uint64_t checksum(const uint8_t* data, size_t size) {
  constexpr int kLanes = 8;
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kFactor * uint64_t(i + 1);
  auto mix = [&](const uint8_t* block) {
    for (int i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, block + i * 8, 8);
      lanes[i] = (lanes[i] ^ word) * kFactor;
      lanes[i] ^= lanes[i] >> 29;
    }
  };
  size_t at = 0;
  for (; at + 64 <= size; at += 64) mix(data + at);
  uint8_t rest[64] = {};
  if (at < size) {
    std::memcpy(rest, data + at, size - at);
    mix(rest);
  }
  uint64_t sum = size;
  for (const uint64_t lane : lanes) sum = ((sum ^ lane) * kFactor) ^ (sum >> 31);
  return sum;
}

bool read_whole(int file, uint8_t* to, size_t size, uint64_t offset) {
  while (size > 0) {
    const ssize_t got = pread(file, to, size, off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got;
    size -= size_t(got);
    offset += uint64_t(got);
  }
  return true;
}

}  // namespace

size_t WeightStore::room(std::span<const RawRows> sources, int64_t cols, bool as_float) {
  return round_up(packed_bytes(packed_shape(sources, cols, as_float)), kAlignment);
}

uint8_t* WeightStore::take(size_t bytes) {
  if (bytes > storage_->size() || round_up(bytes, kAlignment) > storage_->size() - used_)
    throw std::length_error("the weights take more room than was announced");
  uint8_t* const place = storage_->data() + used_;
  used_ += round_up(bytes, kAlignment);
  return place;
}

PackedMatrix WeightStore::add(std::vector<RawRows> sources, int64_t cols, bool as_float) {
  PackedWeight weight = packed_shape(sources, cols, as_float);
  const size_t offset = used_;
  weight.data = take(packed_bytes(weight));
  jobs_.push_back({weight, offset, std::move(sources)});
  return {weight, storage_};
}

uint8_t* WeightStore::add_bytes(size_t bytes, uint32_t version) {
  PackedWeight none;
  none.k = int(version);
  jobs_.push_back({none, used_, {}});
  return take(bytes);
}

std::string WeightStore::description() const {
  std::vector<uint64_t> numbers{kPackedLayoutVersion, kChunkBytes, used_, jobs_.size()};
  for (const auto& [shape, offset, sources] : jobs_) {
    const uint64_t fields[] = {uint64_t(shape.codes), uint64_t(shape.scale_type), shape.affine,      uint64_t(int64_t(shape.zero_point)),
                               uint64_t(shape.group), uint64_t(shape.n),          uint64_t(shape.k), offset};
    numbers.insert(numbers.end(), std::begin(fields), std::end(fields));
  }
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(uint64_t)};
}

void WeightStore::pack(int num_threads) {
  struct Piece {
    const Job* job;
    int begin, end;
  };
  std::vector<Piece> pieces;
  for (const Job& job : jobs_) {
    if (job.sources.empty()) continue;
    const int panels = job.shape.panels();
    const int step = int(std::max<size_t>(1, kPieceBytes * size_t(panels) / packed_bytes(job.shape)));
    for (int panel = 0; panel < panels; panel += step) pieces.push_back({&job, panel, std::min(panel + step, panels)});
  }
  share(pieces.size(), num_threads, [&](size_t i) {
    const auto& [job, begin, end] = pieces[i];
    int64_t first = int64_t(begin) * 16, last = int64_t(end) * 16;  // rows, of those still ahead
    for (const RawRows& source : job->sources) {
      const int64_t from = std::clamp<int64_t>(first, 0, source.rows), to = std::clamp<int64_t>(last, 0, source.rows);
      const size_t row_bytes = source.size / size_t(source.rows);
      if (from < to) touch_pages(source.data + size_t(from) * row_bytes, size_t(to - from) * row_bytes);
      first -= source.rows;
      last -= source.rows;
    }
    pack_panels(job->shape, job->sources, begin, end, storage_->data() + job->offset);
  });
  for (Job& job : jobs_) job.sources.clear();
}

std::vector<uint64_t> WeightStore::checksums(int num_threads) const {
  std::vector<uint64_t> sums(num_chunks());
  share(sums.size(), num_threads,
        [&](size_t chunk) { sums[chunk] = checksum(storage_->data() + chunk * kChunkBytes, chunk_bytes(chunk)); });
  return sums;
}

bool WeightStore::load(int file, uint64_t offset, std::span<const uint64_t> checksums, int num_threads) {
  struct stat status;
  if (checksums.size() != num_chunks() || fstat(file, &status) != 0 || uint64_t(status.st_size) < offset ||
      uint64_t(status.st_size) - offset < used_)
    return false;
  const bool mapped = map_file_over(storage_->data(), used_, file, offset);
  std::atomic<bool> sound{true};
  share(checksums.size(), num_threads, [&](size_t chunk) {
    if (!sound) return;
    uint8_t* data = storage_->data() + chunk * kChunkBytes;
    const size_t size = chunk_bytes(chunk);
    if (mapped)
      touch_pages(data, size);
    else if (!read_whole(file, data, size, offset + chunk * kChunkBytes))
      sound = false;
    if (checksum(data, size) != checksums[chunk]) sound = false;
  });
  if (!sound) {
    clear_memory(storage_->data(), used_);
    return false;
  }
  for (Job& job : jobs_) job.sources.clear();
  is_mapped_ = mapped;
  return true;
}

void WeightStore::move_to_huge_pages(size_t slice) {
  if (slice >= num_slices()) return;
  make_own(storage_->data() + slice * kSliceBytes, std::min(kSliceBytes, used_ - slice * kSliceBytes));
}

}  // namespace setpoint
