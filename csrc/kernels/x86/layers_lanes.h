// Row operations over Lanes: ref/layers.cpp with vectors running across the elements. One body for every ISA.
#pragma once

namespace setpoint {
namespace {

void rms_norm(const float* x, size_t x_stride, const float* weight, float eps, int rows, int n, float* out, size_t out_stride) {
  constexpr int kVectors = 64 / kLanes;
  for (int row = 0; row < rows; ++row) {
    const float* in = x + row * x_stride;
    float* y = out + row * out_stride;
    Lanes sum[kVectors];
    for (int j = 0; j < kVectors; ++j) sum[j] = broadcast(0.f);
    int i = 0;
    for (; i + 64 <= n; i += 64)
      for (int j = 0; j < kVectors; ++j) {
        const Lanes v = load(in + i + j * kLanes);
        sum[j] = fma(v, v, sum[j]);
      }
    for (int j = 0; j < kVectors && i < n; ++j, i += kLanes) {  // lanes past the end add 0 * 0
      const Lanes v = load_first(in + i, n - i < kLanes ? n - i : kLanes);
      sum[j] = fma(v, v, sum[j]);
    }
    Lanes lane[kParts];
    for (int j = 0; j < kParts; ++j) lane[j] = add(add(sum[j], sum[j + kParts]), add(sum[j + 2 * kParts], sum[j + 3 * kParts]));
    const float variance = tree16_sum(lane) / static_cast<float>(n) + eps;
    const Lanes inverse = broadcast(1.f / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(variance))));
    for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, mul(mul(load(in + i), inverse), load(weight + i)));
    if (i < n) store_first(y + i, n - i, mul(mul(load_first(in + i, n - i), inverse), load_first(weight + i, n - i)));
  }
}

SETPOINT_INLINE void rotate(Lanes& first, Lanes& second, Lanes c, Lanes s) {
  const Lanes a = fms(first, c, mul(second, s));
  second = fma(second, c, mul(first, s));
  first = a;
}

void rope(float* x, size_t x_stride, int rows, int heads, int head_dim, int half, const float* cos, const float* sin) {
  for (int row = 0; row < rows; ++row) {
    const float* c = cos + static_cast<size_t>(row) * half;
    const float* s = sin + static_cast<size_t>(row) * half;
    for (int head = 0; head < heads; ++head) {
      float* a = x + row * x_stride + static_cast<size_t>(head) * head_dim;
      float* b = a + half;
      int i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        Lanes first = load(a + i), second = load(b + i);
        rotate(first, second, load(c + i), load(s + i));
        store(a + i, first);
        store(b + i, second);
      }
      if (const int rest = half - i; rest > 0) {
        Lanes first = load_first(a + i, rest), second = load_first(b + i, rest);
        rotate(first, second, load_first(c + i, rest), load_first(s + i, rest));
        store_first(a + i, rest, first);
        store_first(b + i, rest, second);
      }
    }
  }
}

struct SiluMul {
  SETPOINT_INLINE Lanes apply(Lanes gate, Lanes up) { return mul(div(gate, add(broadcast(1.f), exp_lanes(negate(gate)))), up); }
};

struct GeluTanhMul {
  SETPOINT_INLINE Lanes apply(Lanes gate, Lanes up) {
    const Lanes cubic = fma(mul(mul(gate, gate), broadcast(kGeluCubic)), gate, gate);
    const Lanes e = exp_lanes(negate(mul(cubic, broadcast(kGeluTwiceSqrt2OverPi))));
    return mul(div(gate, add(broadcast(1.f), e)), up);
  }
};

struct Sum {
  SETPOINT_INLINE Lanes apply(Lanes a, Lanes b) { return add(a, b); }
};

template <class Operation>
void map_pairs(const float* a, const float* b, size_t stride, int rows, int n, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row, a += stride, b += stride, out += out_stride) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, Operation::apply(load(a + i), load(b + i)));
    if (i < n) store_first(out + i, n - i, Operation::apply(load_first(a + i, n - i), load_first(b + i, n - i)));
  }
}

void silu_mul(const float* gate, const float* up, size_t stride, int rows, int n, float* out, size_t out_stride) {
  map_pairs<SiluMul>(gate, up, stride, rows, n, out, out_stride);
}

void gelu_tanh_mul(const float* gate, const float* up, size_t stride, int rows, int n, float* out, size_t out_stride) {
  map_pairs<GeluTanhMul>(gate, up, stride, rows, n, out, out_stride);
}

void add_rows(const float* x, const float* y, size_t stride, int rows, int n, float* out, size_t out_stride) {
  map_pairs<Sum>(x, y, stride, rows, n, out, out_stride);
}

void exp_values(const float* x, int n, float* out) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_lanes(load(x + i)));
  if (i < n) store_first(out + i, n - i, exp_lanes(load_first(x + i, n - i)));
}

}  // namespace
}  // namespace setpoint
