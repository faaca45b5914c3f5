// Plain C++ for any processor; the compiler may use whatever vectors its baseline has.
#include "kernel.h"

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

struct Vec {
  float v[kLanes];

  static inline Vec zero() { return {}; }
  static inline Vec load(const float* at) {
    Vec to;
    memcpy(to.v, at, sizeof to.v);
    return to;
  }
  static inline Vec load_bf16(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = from_bits(static_cast<uint32_t>(at[i]) << 16);
    return to;
  }
  static inline Vec load_f16(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = from_f16(at[i]);
    return to;
  }
  static inline Vec fma(const Vec& a, const Vec& b, Vec sum) {
    for (int i = 0; i < kLanes; ++i) sum.v[i] += a.v[i] * b.v[i];
    return sum;
  }
  static inline float sum(Vec v) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) v.v[i] += v.v[i + half];
    return v.v[0];
  }
};

constexpr int kRowsForOne = 2, kRows = 1, kTokens = 2;

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kScalar{"scalar", multiply};
}  // namespace moehive
