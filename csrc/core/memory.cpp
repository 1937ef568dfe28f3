#include "core/memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace setpoint {

namespace {

constexpr size_t kPage = 4096;

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

// From the heap, to the byte: the sanitizer sees no access past the end of a mapping.
void* map_memory(size_t bytes) {
  void* address = nullptr;
  if (posix_memalign(&address, bytes >= kHugePage ? kHugePage : kPage, bytes) != 0) throw std::bad_alloc();
  return std::memset(address, 0, bytes);
}

void unmap_memory(void* address, size_t) noexcept { std::free(address); }

bool map_file_over(void*, size_t, int, uint64_t) { return false; }  // the heap is no mapping

void make_own(void*, size_t) {}  // it is already

void clear_memory(void* address, size_t bytes) { std::memset(address, 0, bytes); }

void commit_memory(void*, size_t) noexcept {}

#else

void* map_memory(size_t bytes) {
  const bool huge = bytes >= kHugePage;
  const size_t mapped = round_up(bytes, kPage);
  // A mapping is only page aligned: ask for one huge page more and give back
  // what lies outside the aligned part.
  const size_t asked = huge ? mapped + kHugePage : mapped;
  void* raw = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  if (!huge) return raw;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = round_up(begin, kHugePage);
  if (aligned > begin) munmap(raw, aligned - begin);
  if (const size_t tail = begin + asked - (aligned + mapped); tail > 0) munmap(reinterpret_cast<void*>(aligned + mapped), tail);
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(aligned), mapped,
          MADV_HUGEPAGE);  // only advice: no harm where it is refused
#endif
  return reinterpret_cast<void*>(aligned);
}

void unmap_memory(void* address, size_t bytes) noexcept { munmap(address, round_up(bytes, kPage)); }

bool map_file_over(void* address, size_t bytes, int file, uint64_t offset) {
  return mmap(address, bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, static_cast<off_t>(offset)) != MAP_FAILED;
}

void make_own(void* address, size_t bytes) {
  void* copy = map_memory(bytes);
  std::memcpy(copy, address, bytes);
  // The kernel replaces the old pages under its lock: a thread that meets the gap waits for it to be filled.
  if (mremap(copy, round_up(bytes, kPage), round_up(bytes, kPage), MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED) {
    unmap_memory(copy, bytes);
    throw std::bad_alloc();
  }
}

void clear_memory(void* address, size_t bytes) {
  const size_t mapped = round_up(bytes, kPage);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(address, mapped, PROT_READ | PROT_WRITE, kFlags, -1, 0) == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(address, mapped, MADV_HUGEPAGE);
#endif
}

void commit_memory([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) noexcept {
#if defined(MADV_POPULATE_WRITE)
  madvise(address, bytes, MADV_POPULATE_WRITE);
#endif
}

#endif

}  // namespace setpoint
