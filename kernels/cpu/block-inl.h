// Products of block formats (blocks.h) with a few vectors in 8 bits, written once and compiled for each instruction set.
//
// The including file defines `Vec` (see multiply-inl.h) with splat(float), mul(a, b), from_ints(Sums),
// from_u8(Octets), from_i8(Octets), store(float*), and in `Int8`:
//     Bytes                    64 bytes, one vector of blocks.h: load, field<shift, mask>, join<shift>(a, b) = a | b << shift,
//                              lookup(codes, table)
//     Sums                     16 int32, a row each: splat
//     Wide                     sums that may be narrower: zero, add<Signed>(wide, numbers, four of x), flush(sums, wide)
//     kNarrow                  whether Wide holds 16 bits, so that it must be flushed before it overflows
// Integers are exact, and floats are added block by block in a fixed order: the bits are the same everywhere, for any
// number of tokens, rows and threads. The activations' 8 bits are what ggml uses for these formats too.
#pragma once

#include <string.h>

#include "blocks.h"
#include "kernel.h"

namespace moehive {
namespace {

// The largest number of a unit becomes 127. A unit with an infinity or a NaN becomes NaN.
void quantize(const float* x, int64_t columns, void* memory) {
  const Quantized to = quantized_at(memory, columns);
  int8_t* q = const_cast<int8_t*>(to.q);
  float* d = const_cast<float*>(to.d);
  int32_t* s = const_cast<int32_t*>(to.s);
  const int64_t units = padded_units(columns);
  for (int64_t u = 0; u < units; ++u, q += kUnitColumns, s += 2) {
    float unit[kUnitColumns] = {};
    const int64_t left = columns - u * kUnitColumns;
    if (left > 0) memcpy(unit, x + u * kUnitColumns, (left < kUnitColumns ? left : kUnitColumns) * sizeof(float));
    float largest = 0.0f, poison = 0.0f;
    for (float number : unit) {
      const float size = number < 0.0f ? -number : number;
      largest = size > largest ? size : largest;
      poison += number * 0.0f;
    }
    // Smaller numbers count as zeros: 127 / largest would be infinite.
    const float to_q = largest > 1e-30f && poison == 0.0f ? 127.0f / largest : 0.0f;
    d[u] = largest / 127.0f + poison;
    int32_t sums[2] = {};
    for (int k = 0; k < kUnitColumns; ++k) {
      // Rounds to nearest, ties to even: adding 1.5 * 2^23 leaves the whole number in the low bits.
      const float shifted = (poison == 0.0f ? unit[k] * to_q : 0.0f) + 12582912.0f;
      int32_t bits;
      memcpy(&bits, &shifted, 4);
      const int32_t rounded = bits - 0x4b400000;
      q[k] = static_cast<int8_t>(rounded);
      sums[k / 16] += rounded;
    }
    s[0] = sums[0];
    s[1] = sums[1];
  }
}

typedef uint8_t Octets __attribute__((vector_size(16)));  // a number of each of 16 rows

inline Octets octets(const uint8_t* at) {
  Octets to;
  memcpy(&to, at, 16);
  return to;
}

// 2^(byte - 127), the scales of MXFP4; 0 for byte 0.
inline Vec powers_of_two(Octets bytes) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const Words bits = __builtin_convertvector(bytes, Words) << 23;
  Vec to;
  static_assert(sizeof to == sizeof bits, "16 floats");
  memcpy(&to, &bits, sizeof to);
  return to;
}

constexpr int64_t kBlockBytesAhead = 4 << 10;

// Columns' numbers of a unit, as they are multiplied.
template <Format F>
struct Numbers {
  static constexpr Layout kLayout = layout_of(F);
  static constexpr bool kTable = F == Format::iq4_nl || F == Format::iq4_xs || F == Format::mxfp4;
  static constexpr bool kSigned = (kTable && F != Format::mxfp4) || F == Format::q8_0;
  // Subtracted from each number; by way of the sum of x.
  static constexpr int kOffset = F == Format::q4_0 ? 8 : F == Format::mxfp4 ? 12 : F == Format::q5_0 ? 16 : F == Format::q6_k ? 32
                                 : F == Format::q3_k ? 4 : 0;
  static constexpr int kHalves = F == Format::q2_k || F == Format::q3_k || F == Format::q6_k ? 2 : 1;
  // Largest number, of which `kFlush` times two products with 127 fit 16 bits.
  static constexpr int kLargest = F == Format::mxfp4 ? 24 : kSigned ? 127 : (1 << (kLayout.low + kLayout.high)) - 1;
  static constexpr int kFits = 32767 / (kLargest * 254);
  static constexpr int kFlush = kFits >= 8 ? 8 : kFits >= 4 ? 4 : kFits >= 2 ? 2 : 1;

  template <int I>
  static inline Int8::Bytes get(const uint8_t* unit) {
    constexpr int low = kLayout.low;
    Int8::Bytes numbers;
    if constexpr (low == 8) {
      numbers = Int8::load(unit + 64 * I);
    } else if constexpr (low == 4) {
      numbers = Int8::field<4 * (I % 2), 15>(Int8::load(unit + 64 * (I / 2)));
    } else {
      numbers = Int8::field<2 * (I % 4), 3>(Int8::load(unit + 64 * (I / 4)));
    }
    if constexpr (kLayout.high == 1) {
      numbers = Int8::join<low>(numbers, Int8::field<I, 1>(Int8::load(unit + 64 * low)));
    } else if constexpr (kLayout.high == 2) {
      numbers = Int8::join<low>(numbers, Int8::field<2 * (I % 4), 3>(Int8::load(unit + 64 * (low + I / 4))));
    }
    if constexpr (kTable) {
      alignas(16) static constexpr int8_t kValues[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                         1,    13,   25,  38,  53,  69,  89,  113};
      // E2M1 (1 sign, 2 exponent, 1 fraction bit), doubled, plus 12: products without sign take fewer steps.
      alignas(16) static constexpr int8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
      numbers = Int8::lookup(numbers, F == Format::mxfp4 ? kE2m1 : kValues);
    }
    return numbers;
  }
};

// The scale of each row for a unit's half, and its minimum.
template <Format F>
struct Factors {
  static constexpr Layout kLayout = layout_of(F);

  static inline Octets six(Octets low, Octets high) { return (low & 15) | ((high & 3) << 4); }

  static inline Vec scale(const uint8_t* block, int unit, int half) {
    const Vec d = Vec::load_f16(reinterpret_cast<const uint16_t*>(block));
    const uint8_t* sub = block + 32 + (kLayout.minimum ? 32 : 0);
    if constexpr (kLayout.scales == Scales::none) return d;
    if constexpr (kLayout.scales == Scales::e8m0) return Vec::mul(powers_of_two(octets(block)), Vec::splat(0.5f));
    if constexpr (kLayout.scales == Scales::zeros)
      return Vec::mul(d, powers_of_two(127 - 8 * (octets(block + 32) >> 4)));
    if constexpr (kLayout.scales == Scales::nibbles)
      return Vec::mul(d, Vec::from_u8(octets(sub + 16 * (2 * unit + half)) & 15));
    if constexpr (kLayout.scales == Scales::bytes)
      return Vec::mul(d, Vec::from_i8(octets(sub + 16 * (2 * unit + half))));
    if constexpr (kLayout.scales == Scales::pairs6) {
      const int number = F == Format::q3_k ? half : 0;
      const Octets bits = six(octets(sub + 16 * unit) >> (4 * number),
                              octets(sub + 128 + 16 * (unit / 2)) >> (4 * (unit % 2) + 2 * number));
      if constexpr (F == Format::q3_k) return Vec::mul(d, Vec::from_i8(bits - 32));
      return Vec::mul(d, Vec::from_u8(bits));
    }
    const Octets bits = six(octets(sub + 16 * (unit / 2)) >> (4 * (unit % 2)),
                            octets(sub + 64 + 16 * (unit / 4)) >> (2 * (unit % 4)));
    return Vec::mul(d, Vec::from_i8(bits - 32));
  }

  static inline Vec minimum(const uint8_t* block, int unit, int half) {
    if constexpr (kLayout.scales == Scales::zeros)
      return Vec::mul(scale(block, unit, half), Vec::from_u8(octets(block + 32) & 15));
    const Vec d = Vec::load_f16(reinterpret_cast<const uint16_t*>(block + 32));
    const uint8_t* sub = block + 64;
    if constexpr (kLayout.scales == Scales::nibbles)
      return Vec::mul(d, Vec::from_u8(octets(sub + 16 * (2 * unit + half)) >> 4));
    if constexpr (kLayout.scales == Scales::pairs6)
      return Vec::mul(d, Vec::from_u8(six(octets(sub + 16 * unit) >> 4,
                                          octets(sub + 128 + 16 * (unit / 2)) >> (4 * (unit % 2) + 2))));
    return d;
  }

  // The sign of what the minimum does: legacy formats add it, K-quants subtract it.
  static constexpr float kSign = kLayout.scales == Scales::none ? 1.0f : -1.0f;
};

template <Format F, int T, int Half, int I>
inline void step(const uint8_t* unit, const int8_t* const* x, Int8::Wide* wide, Int8::Sums* dots) {
  using N = Numbers<F>;
  const Int8::Bytes numbers = N::template get<I>(unit);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) wide[t] = Int8::add<N::kSigned>(wide[t], numbers, x[t] + 4 * I);
  constexpr int per_half = 8 / N::kHalves;
  constexpr bool end = (I + 1) % per_half == 0;
  if constexpr (end || (Int8::kNarrow && (I + 1) % N::kFlush == 0)) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      dots[t] = Int8::flush(dots[t], wide[t]);
      wide[t] = Int8::zero();
    }
  }
  if constexpr (!end) step<F, T, Half, I + 1>(unit, x, wide, dots);
}

template <Format F, int T, int Half>
inline void half_unit(const uint8_t* block, const uint8_t* unit, int u, const int8_t* const* x,
                      const Quantized* const* tokens, int64_t at, Vec* sums) {
  using N = Numbers<F>;
  Int8::Wide wide[T];
  Int8::Sums dots[T];
  int32_t x_sum[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const int32_t* s = tokens[t]->s + 2 * at;
    x_sum[t] = N::kHalves == 2 ? s[Half] : s[0] + s[1];
    wide[t] = Int8::zero();
    dots[t] = Int8::splat(-N::kOffset * x_sum[t]);
  }
  step<F, T, Half, Half * 4>(unit, x, wide, dots);
  const Vec scale = Factors<F>::scale(block, u, Half);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    sums[t] = Vec::fma(Vec::from_ints(dots[t]), Vec::mul(scale, Vec::splat(tokens[t]->d[at])), sums[t]);
  if constexpr (N::kLayout.minimum) {
    const Vec minimum = Factors<F>::minimum(block, u, Half);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const float of_x = Factors<F>::kSign * (tokens[t]->d[at] * static_cast<float>(x_sum[t]));
      sums[t] = Vec::fma(minimum, Vec::splat(of_x), sums[t]);
    }
  }
}

// 16 rows with T tokens.
template <Format F, int T>
inline void group(const uint8_t* weights, int64_t blocks, const Quantized* const* tokens, float (*out)[kGroupRows]) {
  constexpr Layout layout = layout_of(F);
  Vec sums[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = Vec::zero();
  const uint8_t* block = weights;
  int64_t at = 0;
  for (int64_t b = 0; b < blocks; ++b, block += layout.bytes()) {
    const uint8_t* unit = block + layout.head();
    for (int u = 0; u < layout.units; ++u, ++at, unit += layout.unit_bytes()) {
      for (int64_t line = 0; line < layout.bytes() / layout.units; line += 64)
        __builtin_prefetch(unit + kBlockBytesAhead + line);
      const int8_t* x[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) x[t] = tokens[t]->q + at * kUnitColumns;
      half_unit<F, T, 0>(block, unit, u, x, tokens, at, sums);
      if constexpr (Numbers<F>::kHalves == 2) half_unit<F, T, 1>(block, unit, u, x, tokens, at, sums);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) Vec::store(out[t], sums[t]);
}

template <Format F, int T>
inline void block_rows(const Product& p, int64_t token) {
  constexpr Layout layout = layout_of(F);
  const int64_t blocks = (p.columns + layout.columns() - 1) / layout.columns();
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  const Quantized* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = static_cast<const Quantized*>(p.x[token + t]);
  for (int64_t row = 0; row < p.rows; row += kGroupRows, weights += blocks * layout.bytes()) {
    alignas(64) float out[T][kGroupRows];
    group<F, T>(weights, blocks, tokens, out);
    const int64_t count = p.rows - row < kGroupRows ? p.rows - row : kGroupRows;
    for (int64_t r = 0; r < count; ++r)
      for (int t = 0; t < T; ++t) p.out[(row + r) * p.out_stride + token + t] = out[t][r];
  }
}

template <Format F>
void multiply_block(const Product& p) {
  int64_t token = 0;
  for (; token + kBlockTokens <= p.tokens; token += kBlockTokens) block_rows<F, kBlockTokens>(p, token);
  if (kBlockTokens > 3 && token + 3 == p.tokens) return block_rows<F, 3>(p, token);
  if (kBlockTokens > 2 && token + 2 == p.tokens) return block_rows<F, 2>(p, token);
  if (token + 1 == p.tokens) block_rows<F, 1>(p, token);
}

static_assert(kBlockTokens >= 2 && kBlockTokens <= 4, "multiply_block has no tile for the tokens that are left");

void multiply_blocks(const Product& p) {
  switch (p.format) {
    case Format::q8_0: return multiply_block<Format::q8_0>(p);
    case Format::q4_0: return multiply_block<Format::q4_0>(p);
    case Format::q4_1: return multiply_block<Format::q4_1>(p);
    case Format::q5_0: return multiply_block<Format::q5_0>(p);
    case Format::q5_1: return multiply_block<Format::q5_1>(p);
    case Format::iq4_nl: return multiply_block<Format::iq4_nl>(p);
    case Format::q2_k: return multiply_block<Format::q2_k>(p);
    case Format::q3_k: return multiply_block<Format::q3_k>(p);
    case Format::q4_k: return multiply_block<Format::q4_k>(p);
    case Format::q5_k: return multiply_block<Format::q5_k>(p);
    case Format::q6_k: return multiply_block<Format::q6_k>(p);
    case Format::iq4_xs: return multiply_block<Format::iq4_xs>(p);
    case Format::int4_g32: return multiply_block<Format::int4_g32>(p);
    case Format::int4_g64: return multiply_block<Format::int4_g64>(p);
    case Format::int4_g128: return multiply_block<Format::int4_g128>(p);
    case Format::mxfp4: return multiply_block<Format::mxfp4>(p);
    default: return;
  }
}

}  // namespace
}  // namespace moehive
