#include "kernels/attention_codes.h"

#include "kernels/kernels.h"
// The order matters: what follows is written in the Lanes of this ISA.
#include "kernels/x86/lanes_avx512.h"

#include "kernels/x86/lanes_math.h"

namespace setpoint {
namespace {

// 32 registers: 24 accumulators, 4 vectors of K or V, a broadcast. The four-cycle FMA needs at least four chains.
constexpr int kMaxScoreVectors = 24, kMaxOutVectors = 24;

}  // namespace
}  // namespace setpoint

// Each on the shoulders of those before it.
#include "kernels/x86/attention_tile.h"

#include "kernels/x86/attention_code_lanes.h"
#include "kernels/x86/attention_lanes.h"

#include "kernels/x86/attention_walk.h"

#include "kernels/x86/kv_store_lanes.h"

namespace setpoint {

void register_avx512_attention(KernelTable& t) {
  t.kv_store = kv_store;
  t.attention = attention;
  t.attention_merge = attention_merge;
}

}  // namespace setpoint
