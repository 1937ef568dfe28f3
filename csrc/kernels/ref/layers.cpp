// Row operations as plain loops. The arithmetic of one element is in kernels/math.h.
#include <cmath>

#include "kernels/attention.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

namespace setpoint {
namespace {

constexpr int kNormLanes = 64;

// Lane i sums the squares of elements i, i + 64, ...; then lanes i, i+16, i+32, i+48 as (a + b) + (c + d), then the
// 16 left by halves. y = (x * (1 / sqrt(mean + eps))) * w.
void rms_norm(const float* x, size_t x_stride, const float* weight, float eps, int rows, int n, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row) {
    const float* in = x + row * x_stride;
    float lanes[kNormLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i % kNormLanes] = std::fma(in[i], in[i], lanes[i % kNormLanes]);
    for (int i = 0; i < 16; ++i) lanes[i] = (lanes[i] + lanes[i + 16]) + (lanes[i + 32] + lanes[i + 48]);
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
    const float inverse = 1.f / std::sqrt(lanes[0] / static_cast<float>(n) + eps);
    float* y = out + row * out_stride;
    for (int i = 0; i < n; ++i) y[i] = (in[i] * inverse) * weight[i];
  }
}

void rope(float* x, size_t x_stride, int rows, int heads, int head_dim, int half, const float* cos, const float* sin) {
  for (int row = 0; row < rows; ++row) {
    const float* c = cos + static_cast<size_t>(row) * half;
    const float* s = sin + static_cast<size_t>(row) * half;
    for (int head = 0; head < heads; ++head) {
      float* a = x + row * x_stride + static_cast<size_t>(head) * head_dim;
      for (int i = 0; i < half; ++i) {
        const float first = a[i], second = a[i + half];
        a[i] = std::fma(first, c[i], -(second * s[i]));
        a[i + half] = std::fma(second, c[i], first * s[i]);
      }
    }
  }
}

template <float (*activation)(float)>
void activation_mul(const float* gate, const float* up, size_t stride, int rows, int n, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < n; ++i) out[row * out_stride + i] = activation(gate[row * stride + i]) * up[row * stride + i];
}

float silu(float x) { return silu_scalar(x); }
float gelu_tanh(float x) { return gelu_tanh_scalar(x); }

void add(const float* x, const float* y, size_t stride, int rows, int n, float* out, size_t out_stride) {
  for (int row = 0; row < rows; ++row)
    for (int i = 0; i < n; ++i) out[row * out_stride + i] = x[row * stride + i] + y[row * stride + i];
}

void exp(const float* x, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = exp_scalar(x[i]);
}

}  // namespace

void register_ref_layers(KernelTable& t) {
  t.rms_norm = rms_norm;
  t.rope = rope;
  t.silu_mul = activation_mul<silu>;
  t.gelu_tanh_mul = activation_mul<gelu_tanh>;
  t.add = add;
  t.exp = exp;
  t.kv_store = ref_kv_store;
  t.attention = ref_attention;
  t.attention_merge = ref_attention_merge;
}

}  // namespace setpoint
