// Numbers of bf16: the upper half of a float. Without external linkage, since it is compiled for each instruction set,
// and into the dispatcher.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moehive {
namespace {

inline float from_bf16(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to nearest, ties to even.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace moehive
