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
#include "exponential-inl.h"

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

// Halves are added, or compared, until one number is left. Of sixteen floats GCC does that by way of memory.
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

inline V silu(V x) { return x / (exponential(-x) + 1.0f); }

}  // namespace
}  // namespace moehive
