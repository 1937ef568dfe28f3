#include "probe/loops.h"

#include "core/cpu_features.h"

#include <cstring>

namespace setpoint {
namespace {

// What any 64-bit CPU can do: words of 8 bytes, in four independent chains.
void read_words(const uint8_t* data, size_t bytes) {
  uint64_t sums[4] = {};
  for (size_t at = 0; at < bytes; at += sizeof sums) {
    uint64_t words[4];
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < 4; ++i) sums[i] |= words[i];
  }
  const uint64_t all = sums[0] | sums[1] | sums[2] | sums[3];
  asm volatile("" ::"r"(all));  // somebody might want the result
}

}  // namespace

const ProbeLoops& probe_loops() {
  static const ProbeLoops best = [] {
    ProbeLoops loops;
    loops.read = read_words;
    if (cpu_features().avx2) register_avx2_probe(loops);
    if (cpu_features().avx512_vnni) register_avx512_probe(loops);
    if (cpu_features().avx512_bf16) register_bf16_probe(loops);
    return loops;
  }();
  return best;
}

}  // namespace setpoint
