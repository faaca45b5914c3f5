// Vectors rounded to bf16, and their products with weights of bf16; written once and compiled for each instruction set.
//
// A product of two numbers of bf16 is exact in f32, and so a sum needs nothing but its order: columns go in pairs, of a
// pair the odd column first, then the even one, each by one fused multiply-add. That is what AVX-512's vdpbf16ps does,
// which also takes numbers below 2^-126 for 0; all others are told to (FlushDenormals).
//
// A rounded vector has padded_pairs(columns) numbers, zeros at the end: of bf16, in their order, for vdpbf16ps;
// elsewhere as floats, of each 32 the odd ones first, then the even ones, so that 16 are what 16 pairs of weights meet.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bf16.h"
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moehive {
namespace {

// While it lives, this thread's floats below 2^-126 are 0, those that come and those that are made.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#elif defined(__aarch64__)
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1 << 24) : "memory");
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }

 private:
  uint64_t before_;
#else
 public:
  FlushDenormals() {}
#endif
};

constexpr int64_t kPairColumns = 2 * kLanes;  // of 16 pairs

#if defined(__AVX512BF16__)

using Rounded = uint16_t;  // a rounded vector's numbers

void round_vector(const float* x, int64_t columns, void* memory) {
  char* to = static_cast<char*>(memory);
  for (int64_t k = 0; k < columns; k += kPairColumns, to += 64) {
    const auto some = [&](int64_t from) {
      const int64_t left = columns - from;
      return _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0, x + from);
    };
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(some(k + 16), some(k))));
  }
}

struct Bf16 {
  using Stored = uint16_t;
  using Number = Rounded;
  using Wide = __m512bh;
  static constexpr int64_t kColumns = kPairColumns;
  static constexpr int kParts = 1;
  template <int>
  static inline Wide load(const uint16_t* at) {
    return reinterpret_cast<Wide>(_mm512_loadu_si512(at));
  }
  static inline Wide vector(const Rounded* x) { return load<0>(x); }
  static inline Vec fma(Wide w, Wide x, Vec sum) { return {_mm512_dpbf16_ps(sum.all, w, x)}; }
};

#else

using Rounded = float;

void round_vector(const float* x, int64_t columns, void* memory) {
  typedef uint32_t Bits __attribute__((vector_size(32)));
  float* to = static_cast<float*>(memory);
  for (int64_t k = 0; k < columns; k += kPairColumns, to += kPairColumns) {
    Bits bits[4] = {};
    const int64_t left = columns - k;
    if (left >= kPairColumns) {  // register by register, as they are read again
      for (int i = 0; i < 4; ++i) memcpy(&bits[i], x + k + 8 * i, sizeof bits[i]);
    } else {
      memcpy(bits, x + k, left * sizeof(float));
    }
    for (Bits& eight : bits) {  // ties to even; what is no number stays so
      const Bits even = eight + 0x7fffu + (eight >> 16 & 1u);
      eight = ((eight & 0x7fffffffu) > 0x7f800000u ? eight | 0x00400000u : even) & 0xffff0000u;
    }
    const Bits apart[4] = {__builtin_shufflevector(bits[0], bits[1], 1, 3, 5, 7, 9, 11, 13, 15),
                           __builtin_shufflevector(bits[2], bits[3], 1, 3, 5, 7, 9, 11, 13, 15),
                           __builtin_shufflevector(bits[0], bits[1], 0, 2, 4, 6, 8, 10, 12, 14),
                           __builtin_shufflevector(bits[2], bits[3], 0, 2, 4, 6, 8, 10, 12, 14)};
    memcpy(to, apart, sizeof apart);
  }
}

struct Bf16 {
  using Stored = uint16_t;
  using Number = Rounded;
  using Wide = Vec;
  static constexpr int64_t kColumns = kPairColumns;
  static constexpr int kParts = 2;  // odd columns, even ones
  template <int Part>
  static inline Wide load(const uint16_t* at) {
    return Part == 0 ? Vec::load_odd(at) : Vec::load_even(at);
  }
  static inline Wide vector(const Rounded* x) { return Vec::load(x); }
  static inline Vec fma(Wide w, Wide x, Vec sum) { return Vec::fma(w, x, sum); }
};

#endif

}  // namespace
}  // namespace moehive
