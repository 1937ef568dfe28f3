// The shapes that the kernels meet: the models the project is measured with.
#pragma once

namespace setpoint::bench {

struct ModelShape {
  const char* name;
  int hidden, intermediate, heads, kv_heads, head_dim, vocab, window;
};

constexpr ModelShape kModels[] = {
    {"smollm2-135m", 576, 1536, 9, 3, 64, 49152, 0},
    {"gemma3-270m", 640, 2048, 4, 1, 256, 262144, 512},
    {"qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936, 0},
    {"qwen2.5-1.5b", 1536, 8960, 12, 2, 128, 151936, 0},
};

}  // namespace setpoint::bench
