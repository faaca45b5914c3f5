// Numbers of f16, one by one. Without external linkage, since it is compiled for each instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moehive {
namespace {

inline float from_bits(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ffu;
  if (exponent == 0) return from_bits(sign | 0x3f800000u) * (fraction * 0x1p-24f);  // zero and subnormals
  if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);        // infinities and NaNs
  return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

// Rounds to nearest, ties to even.
inline uint16_t to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7e00;
  if (size >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
  if (size < 0x38800000u) {  // subnormal: beside 0.5 the last bit is 2^-24
    const float small = from_bits(size) + 0.5f;
    memcpy(&bits, &small, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (((size + 0xfffu + (size >> 13 & 1)) >> 13) - (112u << 10)));
}

}  // namespace
}  // namespace moehive
