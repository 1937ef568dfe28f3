#include "kernels/attention_codes.h"

#include "kernels/kernels.h"
// The order matters: what follows is written in the Lanes of this ISA.
#include "kernels/x86/lanes_avx2.h"

#include "kernels/x86/lanes_math.h"

namespace setpoint {
namespace {

// 16 registers: 12 accumulators, 2 vectors of K or V, a broadcast.
constexpr int kMaxScoreVectors = 12, kMaxOutVectors = 12;

}  // namespace
}  // namespace setpoint

// Each on the shoulders of those before it.
#include "kernels/x86/attention_tile.h"

#include "kernels/x86/attention_code_lanes.h"
#include "kernels/x86/attention_lanes.h"

#include "kernels/x86/attention_walk.h"

#include "kernels/x86/kv_store_lanes.h"

namespace setpoint {

void register_avx2_attention(KernelTable& t) {
  t.kv_store = kv_store;
  t.attention = attention;
  t.attention_merge = attention_merge;
}

}  // namespace setpoint
