// A vector's activations in 8 bits (Quantized of blocks.h), written once and compiled for each instruction set. Without
// external linkage, as all of multiply-inl.h.
#pragma once

#include <string.h>

#include "blocks.h"

namespace moehive {
namespace {

// The largest number of a unit becomes 127. A unit with an infinity or a NaN becomes NaN. The largest of eight lanes
// each, since the compiler may not change the order of comparisons of floats: one after the other takes three times as
// long.
void quantize(const float* x, int64_t columns, void* memory) {
  typedef float Eight __attribute__((vector_size(32)));
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
    float largest = 0.0f, poison = 0.0f;
    for (int i = 0; i < 8; ++i) {
      largest = lanes[i] > largest ? lanes[i] : largest;
      poison += poisons[i];
    }
    // Smaller numbers count as zeros: 127 / largest would be infinite.
    const float to_q = largest > 1e-30f && poison == 0.0f ? 127.0f / largest : 0.0f;
    d[u] = largest / 127.0f + poison;
    int32_t rounded[kUnitColumns] = {};
    for (int i = 0; i < kUnitColumns / 8 && poison == 0.0f; ++i) {
      // Rounds to nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
      const Words bits = reinterpret_cast<Words>(unit[i] * to_q + 12582912.0f) - 0x4b400000u;
      memcpy(rounded + 8 * i, &bits, sizeof bits);
    }
    for (int k = 0; k < kUnitColumns; ++k) q[k] = static_cast<int8_t>(rounded[k]);
    for (int half = 0; half < 2; ++half) {
      int32_t sum = 0;
      for (int k = 0; k < 16; ++k) sum += rounded[16 * half + k];
      s[half] = sum;
    }
    m[u] = d[u] * static_cast<float>(s[0] + s[1]);
  }
}

}  // namespace
}  // namespace moehive
