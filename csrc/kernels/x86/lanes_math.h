// exp and the 16-lane trees over whichever Lanes the including file chose; step for step what math.h does per element.
#pragma once

namespace setpoint {
namespace {

constexpr int kParts = 16 / kLanes;  // vectors per 16 lanes

SETPOINT_INLINE Lanes exp_lanes(Lanes x) {
  x = max(broadcast(kExpLowest), x);
  x = min(broadcast(kExpHighest), x);
  const Lanes shifted = fma(x, broadcast(kLog2E), broadcast(kRoundShift));
  const Lanes n = sub(shifted, broadcast(kRoundShift));
  const Lanes r = fma(n, broadcast(-kLn2Low), fma(n, broadcast(-kLn2High), x));
  Lanes p = fma(broadcast(kExpC6), r, broadcast(kExpC5));
  p = fma(p, r, broadcast(kExpC4));
  p = fma(p, r, broadcast(kExpC3));
  p = fma(p, r, broadcast(kExpC2));
  p = fma(p, r, broadcast(1.f));
  p = fma(p, r, broadcast(1.f));
  return scale_by_power(p, shifted);
}

SETPOINT_INLINE Lanes exp2_lanes(Lanes x) {
  x = max(broadcast(kExp2Lowest), x);
  const Lanes shifted = add(x, broadcast(kRoundShift));
  const Lanes f = sub(x, sub(shifted, broadcast(kRoundShift)));
  Lanes p = fma(broadcast(kExp2C5), f, broadcast(kExp2C4));
  p = fma(p, f, broadcast(kExp2C3));
  p = fma(p, f, broadcast(kExp2C2));
  p = fma(p, f, broadcast(kExp2C1));
  p = fma(p, f, broadcast(1.f));
  return add_exponent(p, shifted);
}

SETPOINT_INLINE float tree16_sum(const Lanes* x) {
  const __m256 eight = fold_sum(x);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SETPOINT_INLINE float tree16_max(const Lanes* x) {
  const __m256 eight = fold_max(x);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace setpoint
