// A vector's activations in 8 bits (Quantized of blocks.h), written once and compiled for each instruction set. Without
// external linkage, as all of multiply-inl.h.
#pragma once

#include <string.h>

#include "blocks.h"

namespace moehive {
namespace {

typedef float Four __attribute__((vector_size(16)));
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

// The largest number of a unit becomes 127. A unit with an infinity or a NaN becomes NaN. The largest of eight lanes
// each, since the compiler may not change the order of comparisons of floats: one after the other takes three times as
// long.
void quantize(const float* x, int64_t columns, void* memory) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  const Quantized to = quantized_at(memory, columns);
  int8_t* q = const_cast<int8_t*>(to.q);
  float* d = const_cast<float*>(to.d);
  float* m = const_cast<float*>(to.m);
  int32_t* s = const_cast<int32_t*>(to.s);
  const int64_t units = padded_units(columns);
  for (int64_t u = 0; u < units; ++u, q += kUnitColumns, s += 2) {
    Eight unit[kUnitColumns / 8] = {};
    const int64_t left = columns - u * kUnitColumns;
    if (left >= kUnitColumns) {  // a size that is known: a few moves
      memcpy(unit, x + u * kUnitColumns, sizeof unit);
    } else if (left > 0) {
      memcpy(unit, x + u * kUnitColumns, left * sizeof(float));
    }
    Eight lanes = {}, poisons = {};
    for (const Eight& eight : unit) {
      const Eight size = reinterpret_cast<Eight>(reinterpret_cast<Words>(eight) & 0x7fffffffu);
      lanes = size > lanes ? size : lanes;
      poisons += eight * 0.0f;
    }
    const float largest = folded<Four>(lanes, [](Four a, Four b) { return a > b ? a : b; });
    const float poison = folded<Four>(poisons, [](Four a, Four b) { return a + b; });  // 0 or no number, in any order
    // Smaller numbers count as zeros: 127 / largest would be infinite.
    const float to_q = largest > 1e-30f && poison == 0.0f ? 127.0f / largest : 0.0f;
    d[u] = largest / 127.0f + poison;
    Ints rounded[kUnitColumns / 8] = {};
    for (int i = 0; i < kUnitColumns / 8 && poison == 0.0f; ++i) {
      // Rounds to nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
      rounded[i] = reinterpret_cast<Ints>(unit[i] * to_q + 12582912.0f) - 0x4b400000;
    }
    int32_t numbers[kUnitColumns];
    memcpy(numbers, rounded, sizeof numbers);
    for (int k = 0; k < kUnitColumns; ++k) q[k] = static_cast<int8_t>(numbers[k]);
    for (int half = 0; half < 2; ++half)
      s[half] = folded<FourInts>(rounded[2 * half] + rounded[2 * half + 1], [](FourInts a, FourInts b) { return a + b; });
    m[u] = d[u] * static_cast<float>(s[0] + s[1]);
  }
}

}  // namespace
}  // namespace moehive
