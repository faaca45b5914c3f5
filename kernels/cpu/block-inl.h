// Products of block formats (blocks.h) with a few vectors in 8 bits, written once, compiled for each instruction set.
//
// The including file defines `Vec` (see multiply-inl.h) with splat(float), mul(a, b), from_ints(Sums), from_u8(Octets),
// powers_of_two(Octets) = 2^(byte - 127), store(float*), and in `Int8`:
//     Bytes                    64 bytes, one vector of blocks.h: load, field<from, to, mask>, join(a, b) = a | b,
//                              lookup(codes, table)
//     Sums                     16 int32, a row each: splat
//     Wide                     sums, perhaps narrower: zero, add<Signed>(wide, numbers, four of x), flush(sums, wide)
//     Factor                   16 factors, a row each: factor<Signed>(16 bytes), flush(sums, wide, factor),
//                              even(factor, n) = factor * 2n, pairs(a, n, b, m) = a * n + b * m for bytes a and b;
//                              |n| and |m| < 2^15, but for even() where kRaised is not 0
//     kNarrow                  whether Wide holds 16 bits, so that it must be flushed before it overflows
//     kRaised                  how much add<true> adds to each number
// and how it reads weights: fetches(), whether they are fetched ahead; with one token kStreams parts of the rows in turns,
// kScaledStreams of formats with sub-block scales.
// Integers are exact, and floats are added block by block in a fixed order: the bits are the same everywhere, for any
// number of tokens, rows and threads. The activations' 8 bits are what ggml uses for these formats too.
#pragma once

#include <string.h>

#include "blocks.h"
#include "kernel.h"
#include "quantize-inl.h"

namespace moehive {
namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

typedef uint8_t Octets __attribute__((vector_size(16)));  // a number of each of 16 rows

inline Octets octets(const uint8_t* at) {
  Octets to;
  memcpy(&to, at, 16);
  return to;
}

// Columns' numbers of a unit, as they are multiplied.
template <Format F>
struct Numbers {
  static constexpr Layout kLayout = layout_of(F);
  static constexpr bool kTable = F == Format::iq4_nl || F == Format::iq4_xs || F == Format::mxfp4;
  static constexpr bool kSigned = (kTable && F != Format::mxfp4) || F == Format::q8_0;
  // Subtracted from each number; by way of the sum of x.
  static constexpr int kOffset = kSigned              ? Int8::kRaised
                                 : F == Format::q4_0  ? 8
                                 : F == Format::mxfp4 ? 12
                                 : F == Format::q5_0  ? 16
                                 : F == Format::q6_k  ? 32
                                 : F == Format::q3_k  ? 4
                                                      : 0;
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
      numbers = Int8::field<4 * (I % 2), 0, 15>(Int8::load(unit + 64 * (I / 2)));
    } else {
      numbers = Int8::field<2 * (I % 4), 0, 3>(Int8::load(unit + 64 * (I / 4)));
    }
    if constexpr (kLayout.high == 1) {
      numbers = Int8::join(numbers, Int8::field<I, low, 1>(Int8::load(unit + 64 * low)));
    } else if constexpr (kLayout.high == 2) {
      numbers = Int8::join(numbers, Int8::field<2 * (I % 4), low, 3>(Int8::load(unit + 64 * (low + I / 4))));
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

// Scales of 256 columns, taken apart once for all of a block's units. `first` has one for each unit or for each 16
// columns; `second` the minimums, or for q3_k the scales of the units' second halves.
template <Format F>
struct SubScales {
  static constexpr Layout kLayout = layout_of(F);
  static constexpr bool kSigned = F == Format::q3_k || F == Format::q6_k || F == Format::iq4_xs;
  static constexpr int64_t kCount = 16 * (kLayout.scales == Scales::nibbles ? 16 : 8);
  typedef uint32_t Words __attribute__((vector_size(32)));  // bytes, but there are no shifts of bytes
  typedef uint8_t Bytes __attribute__((vector_size(32)));

  alignas(32) uint8_t first[kCount], second[kCount];
  const uint8_t* whole;

  inline void take_apart(const uint8_t* block) {
    whole = block + 32;
    constexpr Words shift{4, 4, 4, 4, 0, 0, 0, 0};
    const uint8_t* at = block + 32 + (kLayout.minimum ? 32 : 0);
    if constexpr (kLayout.scales == Scales::nibbles) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const Words both = load(at + 32 * i);
        store(first + 32 * i, both & 0x0f0f0f0fu);
        store(second + 32 * i, both >> 4 & 0x0f0f0f0fu);
      }
    } else if constexpr (kLayout.scales == Scales::pairs6) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Words low = load(at + 32 * i), high = load_twice(at + 128 + 16 * i) << shift;
        const Words one = (low & 0x0f0f0f0fu) | (high & 0x30303030u);
        const Words two = (low >> 4 & 0x0f0f0f0fu) | (high >> 2 & 0x30303030u);
        store(first + 32 * i, kSigned ? (Words)((Bytes)one - 32) : one);
        store(second + 32 * i, kSigned ? (Words)((Bytes)two - 32) : two);
      }
    } else if constexpr (kLayout.scales == Scales::single6) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Words low = load_twice(at + 16 * i) >> (4 - shift), high = load_twice(at + 64 + 16 * (i / 2));
        const Words one = (low & 0x0f0f0f0fu) | (high >> 4 * (i % 2) << (shift / 2 + 2) & 0x30303030u);
        store(first + 32 * i, (Words)((Bytes)one - 32));
      }
    }
  }

  inline const uint8_t* scale(int unit, int half) const {
    if constexpr (F == Format::q6_k) return whole + 16 * (2 * unit + half);
    if constexpr (F == Format::q3_k) return (half ? second : first) + 16 * unit;
    return first + 16 * (F == Format::q2_k ? 2 * unit + half : unit);
  }

 private:
  static inline Words load(const uint8_t* at) {
    Words to;
    memcpy(&to, at, sizeof to);
    return to;
  }
  static inline Words load_twice(const uint8_t* at) {
    typedef uint32_t Half __attribute__((vector_size(16)));
    Half half;
    memcpy(&half, at, sizeof half);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3, 0, 1, 2, 3);
  }
  static inline void store(uint8_t* to, Words words) { memcpy(to, &words, sizeof words); }
};

template <Format F>
constexpr bool has_sub_scales() {
  return layout_of(F).units == 8;
}

// Column groups I .. 4 Half + per_half - 1 of a unit; without sub-scales `factor` is not used.
template <Format F, int T, int Half, int I>
inline void step(const uint8_t* unit, const int8_t* const* x, const Int8::Factor& factor, Int8::Wide* wide,
                 Int8::Sums* dots) {
  using N = Numbers<F>;
  const Int8::Bytes numbers = N::template get<I>(unit);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) wide[t] = Int8::add<N::kSigned>(wide[t], numbers, x[t] + 4 * I);
  constexpr int per_half = 8 / N::kHalves;
  constexpr bool end = (I + 1) % per_half == 0;
  if constexpr (end || (Int8::kNarrow && (I + 1) % N::kFlush == 0)) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      if constexpr (has_sub_scales<F>()) {
        dots[t] = Int8::flush(dots[t], wide[t], factor);
      } else if constexpr (Int8::kNarrow) {
        dots[t] = Int8::flush(dots[t], wide[t]);
      } else {
        dots[t] = wide[t];
      }
      wide[t] = Int8::zero();
    }
  }
  if constexpr (!end) step<F, T, Half, I + 1>(unit, x, factor, wide, dots);
}

template <Format F, int T, int Half>
inline void half_unit(const uint8_t* unit, const Quantized* const* tokens, int64_t at, const Int8::Factor& factor,
                      Int8::Sums* dots) {
  const int8_t* x[T];
  Int8::Wide wide[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    x[t] = tokens[t]->q + at * kUnitColumns;
    if constexpr (has_sub_scales<F>() || Int8::kNarrow) {
      wide[t] = Int8::zero();
    } else {
      wide[t] = dots[t];
    }
  }
  step<F, T, Half, Half * 4>(unit, x, factor, wide, dots);
}

// Fetches Bytes bytes, of one unit: a core has about a dozen lines on their way at once and stops before the next. With
// a whole block of 256 columns fetched at once, K-quants were read 0.8 times as fast.
template <int64_t Bytes>
inline void fetch(const void* at) {
  if (!fetches()) return;
#pragma GCC unroll 8
  for (int64_t line = 0; line < Bytes; line += 64) __builtin_prefetch(static_cast<const char*>(at) + line);
}

// A block whose rows each have one scale: adds to `sums`.
template <Format F, int T>
inline void plain_block(const uint8_t* block, const uint8_t* ahead, const Quantized* const* tokens, int64_t at,
                        Vec* sums) {
  constexpr Layout layout = layout_of(F);
  Vec scale, minimum;
  if constexpr (layout.scales == Scales::e8m0) {
    scale = Vec::powers_of_two(octets(block));  // of numbers that are twice too large; see kE2m1
  } else {
    scale = Vec::load_f16(reinterpret_cast<const uint16_t*>(block));
  }
  if constexpr (layout.scales == Scales::zeros) {
    const Octets coded = octets(block + 32);
    scale = Vec::mul(scale, Vec::powers_of_two(127 - 8 * (coded >> 4)));
    minimum = Vec::mul(scale, Vec::from_u8(coded & 15));
  } else if constexpr (layout.minimum) {
    minimum = Vec::load_f16(reinterpret_cast<const uint16_t*>(block + 32));
  }
  constexpr float of_scale = F == Format::mxfp4 ? 0.5f : 1.0f;
  constexpr float of_minimum = layout.scales == Scales::zeros ? -1.0f : 1.0f;
  const uint8_t* unit = block + layout.head();
#pragma GCC unroll 1
  for (int u = 0; u < layout.units; ++u, ++at, unit += layout.unit_bytes(), ahead += layout.bytes() / layout.units) {
    fetch<layout.bytes() / layout.units>(ahead);
    Int8::Sums dots[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int32_t* s = tokens[t]->s + 2 * at;
      dots[t] = Int8::splat(Numbers<F>::kOffset ? -Numbers<F>::kOffset * (s[0] + s[1]) : 0);
    }
    half_unit<F, T, 0>(unit, tokens, at, Int8::Factor{}, dots);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec factor = Vec::mul(scale, Vec::splat(of_scale * tokens[t]->d[at]));
      sums[t] = Vec::fma(Vec::from_ints(dots[t]), factor, sums[t]);
      if constexpr (layout.minimum) sums[t] = Vec::fma(minimum, Vec::splat(of_minimum * tokens[t]->m[at]), sums[t]);
    }
  }
}

// Subtracts what a block's minimums make of the sums of x.
template <Format F, int T>
inline void take_minimums(const uint8_t* block, const SubScales<F>& scales, const Quantized* const* tokens, int64_t at,
                          Vec* sums) {
  constexpr Layout layout = layout_of(F);
  Vec inner[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) inner[t] = Vec::zero();
#pragma GCC unroll 1
  for (int u = 0; u < layout.units; ++u) {
    if constexpr (Numbers<F>::kHalves == 2) {
      const Octets first = octets(scales.second + 32 * u), second = octets(scales.second + 32 * u + 16);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int32_t* s = tokens[t]->s + 2 * (at + u);
        const Vec both = Vec::from_ints(Int8::pairs(first, s[0], second, s[1]));
        inner[t] = Vec::fma(both, Vec::splat(-tokens[t]->d[at + u]), inner[t]);
      }
    } else {
      const Vec minimum = Vec::from_u8(octets(scales.second + 16 * u));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) inner[t] = Vec::fma(minimum, Vec::splat(-tokens[t]->m[at + u]), inner[t]);
    }
  }
  const Vec of_minimums = Vec::load_f16(reinterpret_cast<const uint16_t*>(block + 32));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) sums[t] = Vec::fma(inner[t], of_minimums, sums[t]);
}

// Blocks of 256 columns with whole numbers as scales within, of S streams that are `apart` bytes from each other: adds
// to `sums`. Streams take turns unit by unit: block by block a core would read one after the other.
template <Format F, int T, int S>
inline void scaled_blocks(const uint8_t* block, const uint8_t* ahead, int64_t apart, const Quantized* const* tokens,
                          int64_t at, Vec (*sums)[T]) {
  constexpr Layout layout = layout_of(F);
  using N = Numbers<F>;
  SubScales<F> scales[S];
  Vec inner[S][T];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    scales[s].take_apart(block + s * apart);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) inner[s][t] = Vec::zero();
  }
  const uint8_t* units = block + layout.head();
#pragma GCC unroll 1
  for (int u = 0; u < layout.units; ++u, units += layout.unit_bytes(), ahead += layout.bytes() / layout.units) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      fetch<layout.bytes() / layout.units>(ahead + s * apart);
      Int8::Sums dots[T];
      const auto half = [&](auto number) {
        constexpr int h = decltype(number)::value;
        const Int8::Factor factor = Int8::factor<SubScales<F>::kSigned>(octets(scales[s].scale(u, h)));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          if constexpr (N::kOffset != 0) {
            const int32_t* sums_of_x = tokens[t]->s + 2 * (at + u);
            const int32_t sum = N::kHalves == 2 ? sums_of_x[h] : sums_of_x[0] + sums_of_x[1];
            const Int8::Sums off = Int8::even(factor, -N::kOffset / 2 * sum);
            dots[t] = h ? Int8::add(dots[t], off) : off;
          } else if (h == 0) {
            dots[t] = Int8::splat(0);
          }
        }
        half_unit<F, T, h>(units + s * apart, tokens, at + u, factor, dots);
      };
      half(Number<0>{});
      if constexpr (N::kHalves == 2) half(Number<1>{});
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        inner[s][t] = Vec::fma(Vec::from_ints(dots[t]), Vec::splat(tokens[t]->d[at + u]), inner[s][t]);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    const Vec d = Vec::load_f16(reinterpret_cast<const uint16_t*>(block + s * apart));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[s][t] = Vec::fma(inner[s][t], d, sums[s][t]);
    if constexpr (layout.minimum) take_minimums<F, T>(block + s * apart, scales[s], tokens, at, sums[s]);
  }
}

constexpr int64_t kBlockBytesAhead = 4 << 10;  // of all streams together

// The front of what is fetched ahead of one of `streams`: it runs through a product's blocks and then on through what
// is wanted next.
class Ahead {
 public:
  Ahead(const uint8_t* weights, int64_t bytes, int64_t block_bytes, const void* next, int64_t streams)
      : end_(weights + bytes), next_(static_cast<const uint8_t*>(next)) {
    const int64_t distance = (kBlockBytesAhead / streams + block_bytes - 1) / block_bytes * block_bytes;
    at = distance < bytes ? weights + distance : next_ + (distance - bytes);
  }
  void step(int64_t block_bytes) {
    at += block_bytes;
    if (at == end_) at = next_;
  }
  const uint8_t* at;

 private:
  const uint8_t* end_;
  const uint8_t* next_;
};

// 16 rows with T tokens, of S streams that are `apart` bytes from each other.
template <Format F, int T, int S>
__attribute__((noinline)) void group(const uint8_t* weights, int64_t apart, int64_t blocks, Ahead* ahead_of_all,
                                     const Quantized* const* tokens, float (*out)[T][kGroupRows]) {
  constexpr Layout layout = layout_of(F);
  Ahead ahead = *ahead_of_all;
  Vec sums[S][T];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[s][t] = Vec::zero();
  for (int64_t b = 0; b < blocks; ++b, weights += layout.bytes(), ahead.step(layout.bytes())) {
    if constexpr (has_sub_scales<F>()) {
      scaled_blocks<F, T, S>(weights, ahead.at, apart, tokens, b * layout.units, sums);
    } else {
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s)
        plain_block<F, T>(weights + s * apart, ahead.at + s * apart, tokens, b * layout.units, sums[s]);
    }
  }
  *ahead_of_all = ahead;
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) Vec::store(out[s][t], sums[s][t]);
}

// A token's sums of the 16 rows from `row` on, or of those that there are.
inline void store_group(const Product& p, int64_t token, int64_t row, const float* sums) {
  float* to = p.out + token * p.out_stride + row;
  if (row + kGroupRows <= p.rows) {  // a size that is known: one move
    memcpy(to, sums, kGroupRows * sizeof(float));
  } else {
    memcpy(to, sums, (p.rows - row) * sizeof(float));
  }
}

// S times `groups` groups of 16 rows, from row `first` on.
template <Format F, int T, int S>
inline void block_streams(const Product& p, int64_t token, int64_t first, int64_t groups) {
  constexpr Layout layout = layout_of(F);
  const int64_t blocks = (p.columns + layout.columns() - 1) / layout.columns(), group_bytes = blocks * layout.bytes();
  const int64_t apart = groups * group_bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights) + first / kGroupRows * group_bytes;
  const Quantized* tokens[T];
  for (int t = 0; t < T; ++t) tokens[t] = static_cast<const Quantized*>(p.x[token + t]);
  Ahead ahead(weights, apart, layout.bytes(), token + T < p.tokens ? p.weights : p.next, S);
  for (int64_t g = 0; g < groups; ++g, weights += group_bytes) {
    alignas(64) float out[S][T][kGroupRows];
    group<F, T, S>(weights, apart, blocks, &ahead, tokens, out);
    for (int s = 0; s < S; ++s) {
      const int64_t row = first + (s * groups + g) * kGroupRows;
      for (int t = 0; t < T; ++t) store_group(p, token + t, row, out[s][t]);
    }
  }
}

template <Format F, int T>
inline void block_rows(const Product& p, int64_t token) {
  // With more tokens arithmetic takes longer than reading.
  constexpr int S = T > 1 ? 1 : has_sub_scales<F>() ? kScaledStreams : kStreams;
  const int64_t groups = (p.rows + kGroupRows - 1) / kGroupRows, each = groups / S;
  if (each) block_streams<F, T, S>(p, token, 0, each);
  if (S > 1 && each * S < groups) block_streams<F, T, 1>(p, token, each * S * kGroupRows, groups - each * S);
}

// The tokens from `token` on, T at a time, and what is left then by fewer.
template <Format F, int T>
void block_tokens(const Product& p, int64_t token) {
  for (; token + T <= p.tokens; token += T) block_rows<F, T>(p, token);
  if constexpr (T > 1) block_tokens<F, (T > 4 ? 4 : T - 1)>(p, token);
}

template <Format F>
void multiply_block(const Product& p) {
  block_tokens<F, kBlockTokens>(p, 0);
}

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
