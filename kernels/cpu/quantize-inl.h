// A vector's activations in 8 bits (Quantized of blocks.h), written once and compiled for each instruction set. Without
// external linkage, as all of multiply-inl.h.
#pragma once

#include <string.h>

#include "blocks.h"

namespace moehive {
namespace {

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(32)));

// Of eight lanes one: halves with each other.
template <class Half, class Whole, class Join>
inline auto folded(const Whole& lanes, Join&& join) {
  Half halves[2];
  memcpy(halves, &lanes, sizeof halves);
  Half all = join(halves[0], halves[1]);
  all = join(all, __builtin_shufflevector(all, all, 2, 3, 0, 1));
  return join(all, __builtin_shufflevector(all, all, 1, 0, 3, 2))[0];
}

// The largest number of a unit becomes 127. A unit with an infinity or a NaN becomes NaN. Sizes are compared as whole
// numbers, whose order is the same: of floats one after the other would take three times as long.
void quantize(const float* x, int64_t columns, void* memory) {
  const Quantized to = quantized_at(memory, columns);
  int8_t* q = const_cast<int8_t*>(to.q);
  float* d = const_cast<float*>(to.d);
  float* m = const_cast<float*>(to.m);
  int32_t* s = const_cast<int32_t*>(to.s);
  const int64_t units = padded_units(columns);
  for (int64_t u = 0; u < units; ++u, q += kUnitColumns, s += 2) {
    const int64_t left = columns - u * kUnitColumns;
    const float* from = x + u * kUnitColumns;
    float last[kUnitColumns];
    if (left < kUnitColumns) {
      memset(last, 0, sizeof last);
      if (left > 0) memcpy(last, from, left * sizeof(float));
      from = last;
    }
    // Register by register, here and below: what another width wrote can be read only after it has reached the cache.
    Eight unit[kUnitColumns / 8];
    for (int i = 0; i < kUnitColumns / 8; ++i) memcpy(&unit[i], from + 8 * i, sizeof unit[i]);
    Ints sizes = {};
    for (const Eight& eight : unit) {
      const Ints size = reinterpret_cast<Ints>(eight) & 0x7fffffff;
      sizes = size > sizes ? size : sizes;
    }
    const int32_t bits = folded<FourInts>(sizes, [](FourInts a, FourInts b) { return a > b ? a : b; });
    const bool finite = bits < 0x7f800000;
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    // Smaller numbers count as zeros: 127 / largest would be infinite.
    const float to_q = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
    d[u] = finite ? largest / 127.0f : __builtin_nanf("");
    Ints rounded[kUnitColumns / 8] = {};
    for (int i = 0; i < kUnitColumns / 8 && finite; ++i) {
      // Rounds to nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
      rounded[i] = reinterpret_cast<Ints>(unit[i] * to_q + 12582912.0f) - 0x4b400000;
    }
    int32_t numbers[kUnitColumns];
    for (int i = 0; i < kUnitColumns / 8; ++i) memcpy(numbers + 8 * i, &rounded[i], sizeof rounded[i]);
    for (int k = 0; k < kUnitColumns; ++k) q[k] = static_cast<int8_t>(numbers[k]);
    for (int half = 0; half < 2; ++half)
      s[half] = folded<FourInts>(rounded[2 * half] + rounded[2 * half + 1], [](FourInts a, FourInts b) { return a + b; });
    m[u] = d[u] * static_cast<float>(s[0] + s[1]);
  }
}

}  // namespace
}  // namespace moehive
