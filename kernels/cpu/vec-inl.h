// kWidth floats as one value, for code that is written once and compiled for several instruction sets.
//
// GCC's vector type; the including file defines kWidth, and the compiler splits a vector where registers are narrower.
// Nothing here has external linkage nor uses the standard library, else the linker might keep an AVX2 copy of a shared
// function.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace moehive {
namespace {

typedef float V __attribute__((vector_size(kWidth * 4)));
typedef int32_t I __attribute__((vector_size(kWidth * 4)));
typedef uint32_t U __attribute__((vector_size(kWidth * 4)));
typedef uint16_t H __attribute__((vector_size(kWidth * 2)));

inline V load(const float* at) {
  V v;
  memcpy(&v, at, sizeof v);
  return v;
}

inline V load(const uint16_t* bf16) {
  H half;
  memcpy(&half, bf16, sizeof half);
  return (V)(__builtin_convertvector(half, U) << 16);
}

inline void store(float* at, V v) { memcpy(at, &v, sizeof v); }

inline V same(float x) { return x - V{}; }

// Halves are added until one number is left, or compared. GCC makes this of it with AVX-512 by way of memory.
#if defined(__AVX512F__)
inline float sum(V v) { return _mm512_reduce_add_ps((__m512)v); }
inline float largest(V v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(V v) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
inline float largest(V v) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i + half] > v[i] ? v[i + half] : v[i];
  return v[0];
}
#endif

// e^x in each lane, relative error about 1e-7; 0 below -87, e^88 above 88. After Cephes' expf; see activation.h.
inline V exponential(V x) {
  const V low = same(-87.0f), high = same(88.0f);
  V bounded = x < low ? low : x;  // so that what is no number stays so
  bounded = bounded > high ? high : bounded;
  const V shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = same(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const V power = (V)(((I)shifted + 127) << 23);
  return x < low ? V{} : y * power;
}

inline V silu(V x) { return x / (exponential(-x) + 1.0f); }

}  // namespace
}  // namespace moehive
