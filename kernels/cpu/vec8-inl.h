// Eight floats as one value, for code that is written once and compiled for several instruction sets.
//
// GCC's vector type: the compiler splits it where registers are narrower. Nothing here has external linkage nor uses
// the standard library, else the linker might keep an AVX2 copy of a shared function.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace moehive {
namespace {

constexpr int64_t kEight = 8;

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

inline F8 load8(const float* at) {
  F8 v;
  memcpy(&v, at, sizeof v);
  return v;
}

inline F8 load8(const uint16_t* bf16) {
  H8 half;
  memcpy(&half, bf16, sizeof half);
  return (F8)(__builtin_convertvector(half, I8) << 16);
}

inline void store8(float* at, F8 v) { memcpy(at, &v, sizeof v); }

inline F8 all8(float x) { return F8{} + x; }

// a * b + sum, rounded once where the processor has such an instruction.
inline F8 fma8(F8 a, F8 b, F8 sum) {
#if defined(__FMA__)
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
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

inline float sum8(F8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// The dot product of n floats: eight lanes, then the rest one by one.
template <class Left>
inline float dot(const Left* left, const float* right, int64_t n) {
  F8 even = {}, odd = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    even = fma8(load8(left + i), load8(right + i), even);
    odd = fma8(load8(left + i + 8), load8(right + i + 8), odd);
  }
  if (i + 8 <= n) {
    even = fma8(load8(left + i), load8(right + i), even);
    i += 8;
  }
  float sum = sum8(even + odd);
  for (; i < n; ++i) {
    float wide;
    if constexpr (sizeof(Left) == 2) {
      const uint32_t bits = static_cast<uint32_t>(left[i]) << 16;
      memcpy(&wide, &bits, sizeof wide);
    } else {
      wide = left[i];
    }
    sum += wide * right[i];
  }
  return sum;
}

// e^x in each lane; see exponential() in activation.h.
inline F8 exp8(F8 x) {
  x = x < -87.0f ? all8(-87.0f) : x;
  x = x > 88.0f ? all8(88.0f) : x;
  const F8 shifted = x * 1.44269504088896341f + 12582912.0f;
  const F8 n = shifted - 12582912.0f;
  const F8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F8 y = all8(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (F8)(((I8)shifted + 127) << 23);
}

inline F8 silu8(F8 x) { return x / (exp8(-x) + 1.0f); }

}  // namespace
}  // namespace moehive
