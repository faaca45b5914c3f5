// Vectors of eight floats with exact fused multiply-adds, for the trunk's recurrent and latent layers.
#pragma once

#include <stdint.h>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace moehive {
namespace {
constexpr int kWidth = 8;
}
}  // namespace moehive

#include "vec-inl.h"

namespace moehive {
namespace {

// a * b + sum, rounded once where the processor has such an instruction.
inline V fma(V a, V b, V sum) {
#if defined(__FMA__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
  float32x4_t x[2], y[2], z[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  memcpy(z, &sum, sizeof sum);
  z[0] = vfmaq_f32(z[0], x[0], y[0]);
  z[1] = vfmaq_f32(z[1], x[1], y[1]);
  memcpy(&sum, z, sizeof sum);
  return sum;
#else
  return a * b + sum;
#endif
}

// The dot product of n floats: eight lanes, then the rest one by one.
template <class Left>
inline float dot(const Left* left, const float* right, int64_t n) {
  V even = {}, odd = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    even = fma(load(left + i), load(right + i), even);
    odd = fma(load(left + i + 8), load(right + i + 8), odd);
  }
  if (i + 8 <= n) {
    even = fma(load(left + i), load(right + i), even);
    i += 8;
  }
  float total = sum(even + odd);
  for (; i < n; ++i) {
    if constexpr (sizeof(Left) == 2) {
      total += from_bf16(left[i]) * right[i];
    } else {
      total += left[i] * right[i];
    }
  }
  return total;
}

}  // namespace
}  // namespace moehive
