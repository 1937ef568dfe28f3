// The scalar definitions that every ISA variant repeats lane by lane: exp, sigmoid, and the 16-bit float formats.
// One sequence of IEEE float steps each, so that scalar, AVX2 and AVX-512 give the same bits.
// Everything here is forced inline: x86/ units may include it without leaving a copy for others to link.
#pragma once
#include <cstdint>
#include <cstring>

#define SETPOINT_INLINE static inline __attribute__((always_inline))

namespace setpoint {

// exp(x): n = round(x / ln 2), r = x - n ln 2 in two fma, a degree 6 polynomial of r, times 2^n.
// Polynomial: minimax for |r| <= ln2 / 2 (relative error 0.06 ulp); whole function <= 1 ulp, subnormal results too.
// Inputs are clamped to where the result is 0 or infinity anyway; NaN stays NaN.
constexpr float kExpLowest = -104.f, kExpHighest = 89.f;
constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e430p-1f, kLn2Low = -0x1.05c610p-29f;
constexpr float kRoundShift = 0x1.8p+23f;  // adding it leaves round-to-nearest-even(x) in the low mantissa bits
constexpr float kExpC6 = 0x1.6a2402p-10f, kExpC5 = 0x1.123a00p-7f, kExpC4 = 0x1.5558f2p-5f, kExpC3 = 0x1.555492p-3f,
                kExpC2 = 0x1.fffffcp-2f;

// gelu_tanh(x) = 0.5 x (1 + tanh u) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation.
constexpr float kGeluTwiceSqrt2OverPi = 0x1.9884540p+0f;
constexpr float kGeluCubic = 0.044715f;

constexpr float kF16Largest = 65504.f;
constexpr uint32_t kBf16LargestBits = 0x7f7f0000u;  // as an f32

SETPOINT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
SETPOINT_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

SETPOINT_INLINE float exp_scalar(float x) {
  x = kExpLowest > x ? kExpLowest : x;
  x = kExpHighest < x ? kExpHighest : x;
  const float shifted = __builtin_fmaf(x, kLog2E, kRoundShift);
  const float n = shifted - kRoundShift;
  const float r = __builtin_fmaf(n, -kLn2Low, __builtin_fmaf(n, -kLn2High, x));
  float p = __builtin_fmaf(kExpC6, r, kExpC5);
  p = __builtin_fmaf(p, r, kExpC4);
  p = __builtin_fmaf(p, r, kExpC3);
  p = __builtin_fmaf(p, r, kExpC2);
  p = __builtin_fmaf(p, r, 1.f);
  p = __builtin_fmaf(p, r, 1.f);
  // 2^n in two exact factors, so that only a subnormal result is rounded, once.
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRoundShift));
  const int32_t half = exponent >> 1;
  return p * float_of(static_cast<uint32_t>(half + 127) << 23) * float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
}

// 2^x for x <= 1 or so: 2^n by the exponent, minimax polynomial of the rest (relative error 1e-7). exp2(0) = 1. Below -125
// the result stays 2^-125.
constexpr float kExp2Lowest = -125.f;
constexpr float kExp2C5 = 0x1.5bba14p-10f, kExp2C4 = 0x1.3cea88p-7f, kExp2C3 = 0x1.c6b752p-5f, kExp2C2 = 0x1.ebf9bcp-3f,
                kExp2C1 = 0x1.62e42ap-1f;

SETPOINT_INLINE float exp2_scalar(float x) {
  x = kExp2Lowest > x ? kExp2Lowest : x;
  const float shifted = x + kRoundShift;
  const float f = x - (shifted - kRoundShift);
  float p = __builtin_fmaf(kExp2C5, f, kExp2C4);
  p = __builtin_fmaf(p, f, kExp2C3);
  p = __builtin_fmaf(p, f, kExp2C2);
  p = __builtin_fmaf(p, f, kExp2C1);
  p = __builtin_fmaf(p, f, 1.f);
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// x * sigmoid(x). Below -88.7 the true value (< 1e-36) becomes -0.
SETPOINT_INLINE float silu_scalar(float x) { return x / (1.f + exp_scalar(-x)); }

SETPOINT_INLINE float gelu_tanh_scalar(float x) {
  const float cubic = __builtin_fmaf(x * x * kGeluCubic, x, x);
  return x / (1.f + exp_scalar(-(cubic * kGeluTwiceSqrt2OverPi)));
}

// IEEE half, round to nearest even. Finite values and infinities beyond the format saturate to +-65504, so that a
// cache never holds an infinity; NaN stays NaN.
SETPOINT_INLINE uint16_t f16_from_float(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477fe000u) return static_cast<uint16_t>(sign | 0x7bffu);  // >= 65504
  if (magnitude < 0x38800000u) {                                               // < 2^-14: subnormal or zero
    if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);           // < 2^-25: zero
    const uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return static_cast<uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

SETPOINT_INLINE float float_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or NaN made quiet as the hardware does
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_of(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // subnormal: magnitude * 2^-24, exact
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// bfloat16, round to nearest even, saturating like f16.
SETPOINT_INLINE uint16_t bf16_from_float(float x) {
  const uint32_t u = bits_of(x), sign = u & 0x80000000u;
  uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  if (magnitude > kBf16LargestBits) magnitude = kBf16LargestBits;
  return static_cast<uint16_t>((sign | (magnitude + 0x7fffu + ((magnitude >> 16) & 1u))) >> 16);
}

SETPOINT_INLINE float float_from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

}  // namespace setpoint
