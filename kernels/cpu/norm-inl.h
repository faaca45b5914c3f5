// What layers do with a row of floats, for the trunk's arithmetic of each instruction set.
#pragma once

#include <math.h>

#include "vec-inl.h"

namespace moehive {
namespace {

inline float squares(const float* x, int64_t n) {
  V sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int k = 0; k < 2; ++k) {
      const V v = load(x + i + k * kWidth);
      sums[k] += v * v;
    }
  float total = sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

inline float inverse_rms(const float* x, int64_t n, float eps) {
  return 1.0f / sqrtf(squares(x, n) / static_cast<float>(n) + eps);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace
}  // namespace moehive
