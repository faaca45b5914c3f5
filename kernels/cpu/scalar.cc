// Plain C++ for any processor; the compiler may use whatever vectors its baseline has.
#include "f16.h"
#include "kernel.h"

#include <string.h>

namespace moehive {
namespace {

// Integer operations for the block formats; see block-inl.h.
struct Int8 {
  struct Bytes {
    uint8_t v[64];
  };
  struct Sums {
    int32_t v[kLanes];
  };
  using Wide = Sums;
  using Factor = Sums;
  static constexpr bool kNarrow = false;
  static constexpr int kRaised = 0;

  static inline Bytes load(const uint8_t* at) {
    Bytes to;
    memcpy(to.v, at, 64);
    return to;
  }
  // The bits `Mask` from bit From of each byte, at bit To.
  template <int From, int To, int Mask>
  static inline Bytes field(Bytes b) {
    for (int i = 0; i < 64; ++i) b.v[i] = static_cast<uint8_t>((b.v[i] >> From & Mask) << To);
    return b;
  }
  static inline Bytes join(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
    return a;
  }
  static inline Bytes lookup(Bytes codes, const int8_t* table) {
    for (int i = 0; i < 64; ++i) codes.v[i] = static_cast<uint8_t>(table[codes.v[i]]);
    return codes;
  }
  static inline Sums splat(int32_t n) {
    Sums to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = n;
    return to;
  }
  static inline Wide zero() { return {}; }
  template <bool Signed>
  static inline Wide add(Wide w, const Bytes& b, const int8_t* x) {
    for (int row = 0; row < kLanes; ++row)
      for (int k = 0; k < 4; ++k) {
        const int32_t number = Signed ? static_cast<int8_t>(b.v[4 * row + k]) : b.v[4 * row + k];
        w.v[row] += number * x[k];
      }
    return w;
  }
  static inline Sums flush(Sums s, const Wide& w) { return add(s, w); }
  static inline Sums flush(Sums s, const Wide& w, const Factor& f) {
    for (int i = 0; i < kLanes; ++i) s.v[i] += w.v[i] * f.v[i];
    return s;
  }
  static inline Sums add(Sums a, const Sums& b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }

  typedef uint8_t Octets __attribute__((vector_size(16)));
  template <bool Signed>
  static inline Factor factor(Octets o) {
    Factor to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = Signed ? static_cast<int8_t>(o[i]) : o[i];
    return to;
  }
  static inline Sums even(Factor f, int32_t n) {
    for (int i = 0; i < kLanes; ++i) f.v[i] *= 2 * n;
    return f;
  }
  static inline Sums pairs(Octets a, int32_t n, Octets b, int32_t m) {
    Sums to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = a[i] * n + b[i] * m;
    return to;
  }
};

struct Vec {
  float v[kLanes];

  typedef uint8_t Octets __attribute__((vector_size(16)));
  static inline Vec splat(float n) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = n;
    return to;
  }
  static inline Vec mul(Vec a, const Vec& b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static inline Vec from_ints(const Int8::Sums& s) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = static_cast<float>(s.v[i]);
    return to;
  }
  static inline Vec from_u8(Octets o) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = o[i];
    return to;
  }
  static inline Vec powers_of_two(Octets o) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = from_bits(static_cast<uint32_t>(o[i]) << 23);
    return to;
  }
  static inline void store(float* to, const Vec& v) { memcpy(to, v.v, sizeof v.v); }

  static inline Vec zero() { return {}; }
  static inline Vec load(const float* at) {
    Vec to;
    memcpy(to.v, at, sizeof to.v);
    return to;
  }
  // Of 32 numbers of bf16 the odd or the even ones.
  static inline Vec load_odd(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = from_bits(static_cast<uint32_t>(at[2 * i + 1]) << 16);
    return to;
  }
  static inline Vec load_even(const uint16_t* at) {
    Vec to;
    for (int i = 0; i < kLanes; ++i) to.v[i] = from_bits(static_cast<uint32_t>(at[2 * i]) << 16);
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

constexpr int kRowsForOne = 2, kRows = 1, kTokens = 2, kBlockTokens = 2;
constexpr int kSumsAtOnce = 0;
constexpr int kStreams = 1, kScaledStreams = 1;
constexpr bool fetches() { return true; }

}  // namespace
}  // namespace moehive

#include "multiply-inl.h"

namespace moehive {
extern const Kernel kScalar{"scalar", multiply, quantize, round_vector, activate, join_gate};
}  // namespace moehive
