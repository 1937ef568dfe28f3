// Zeroed, aligned memory straight from the operating system: weights, KV caches
// and scratch live in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace setpoint {

// At least `bytes` of zeroed memory, aligned to 4 KiB, or to 2 MiB (with huge
// pages advised) from 2 MiB on. Pages are committed when first touched. Throws
// std::bad_alloc.
void* map_memory(size_t bytes);
void unmap_memory(void* address, size_t bytes) noexcept;

// Puts a file's bytes, read-only, in the place of the first `bytes` of such memory: true where the system can. The file
// must be that long, and stay so. `offset` must be a multiple of the page size.
bool map_file_over(void* address, size_t bytes, int file, uint64_t offset);
// Moves the bytes that are there into memory of our own, at the same address and at once for everybody: threads may read
// them meanwhile. `address` is one of map_memory or a multiple of a huge page behind it. Throws std::bad_alloc.
void make_own(void* address, size_t bytes);
// Zeros in the place of what is there now, without touching a page.
void clear_memory(void* address, size_t bytes);

constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Commits pages of such memory before they are touched; does nothing where the system cannot.
void commit_memory(void* address, size_t bytes) noexcept;

// An owned array of plain values, zero-initialized and never resized.
template <class T>
class MappedArray {
 public:
  MappedArray() = default;
  explicit MappedArray(size_t size) : values_(size == 0 ? nullptr : static_cast<T*>(map_memory(bytes_of(size)))), size_(size) {}
  MappedArray(MappedArray&& other) noexcept : values_(std::exchange(other.values_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedArray& operator=(MappedArray&& other) noexcept {
    std::swap(values_, other.values_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedArray() {
    if (values_ != nullptr) unmap_memory(values_, size_ * sizeof(T));
  }

  T* data() { return values_; }
  const T* data() const { return values_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return values_[i]; }
  const T& operator[](size_t i) const { return values_[i]; }

 private:
  // A product that overflows asks for more than any machine has, and map_memory
  // refuses it.
  static size_t bytes_of(size_t size) { return size > SIZE_MAX / 2 / sizeof(T) ? SIZE_MAX / 2 : size * sizeof(T); }

  T* values_ = nullptr;
  size_t size_ = 0;
};

}  // namespace setpoint
