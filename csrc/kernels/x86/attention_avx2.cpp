#include <type_traits>

#include "kernels/attention.h"
#include "kernels/x86/lanes_avx2.h"

#include "kernels/x86/lanes_math.h"

namespace setpoint {
namespace {

// 16 registers: 12 accumulators, 2 vectors of K or V, a broadcast.
constexpr int kMaxScoreVectors = 12, kMaxOutVectors = 12;

}  // namespace
}  // namespace setpoint

#include "kernels/x86/attention_lanes.h"

namespace setpoint {

void register_avx2_attention(KernelTable& t) { register_attention(t); }

}  // namespace setpoint
