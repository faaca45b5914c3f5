// e^x of a register of floats, the same on every machine. Without external linkage, as all of multiply-inl.h.
#pragma once

namespace moehive {
namespace {

// e^x in each lane of V, a vector of floats: within 2 units in the last place for -87 <= x <= 88, 0 below, e^88 above;
// what is no number stays so. The C library's own differs between machines, and the compiler can't do several of those
// at once. After Cephes' expf (Moshier).
template <class V>
inline V exponential(V x) {
  using I = decltype(x < x);  // whole numbers, as many
  const V low = -87.0f - V{}, high = 88.0f - V{};
  V bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  const V shifted = bounded * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the whole number is in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = 1.9875691500e-4f - V{};
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const V power = (V)(((I)shifted + 127) << 23);  // 2^n
  return x < low ? V{} : y * power;
}

}  // namespace
}  // namespace moehive
