// Products of FP8 weights with vectors rounded to bf16, written once and compiled for each instruction set.
//
// E4M3: 1 sign, 4 exponent (bias 7), 3 fraction bits; subnormals; no infinities; largest 448; S.1111.111 is no number
// and is kept out by whoever packs. A block of 128 x 128 shares one f32 scale.
//
//     block    [f32 scale] [12 bytes of zeros] [128 columns x 16 rows]       for each 128 columns of 16 rows
//
// Rows are padded to 16, columns to 128, with zeros.
//
// The sum of a block: its pairs of columns p, p + 4, p + 8, ... one after the other (bf16-inl.h has a pair's order), then
// the four sums; blocks are added in order by fma with their scale. The bits are the same everywhere, for any number of
// tokens and threads.
//
// Every number is one of bf16, looked up by its code for vdpbf16ps. Elsewhere it is expanded to f32: shifted into the bits
// of an f16 or f32, a code means its number times a power of two, subnormals too, and that power is made up for in the
// other factor and in the scale. So sums below 2^-86 may be rounded otherwise than by vdpbf16ps, and vectors' numbers are to
// be below 2^47.
#pragma once

#include <string.h>

#include "bf16-inl.h"
#include "kernel.h"

namespace moehive {
namespace {

constexpr int64_t kFp8Head = 16;

inline float fp8_scale(const uint8_t* block) {
  float scale;
  memcpy(&scale, block, sizeof scale);
  return scale;
}

inline Vec plus(Vec a, Vec b) { return Vec::fma(a, Vec::splat(1.0f), b); }

// How a pair of columns is multiplied: Pair, 16 rows' numbers in it; expand(codes of four columns, two pairs);
// store(memory of a pair, pair), load; vector(x, memory), n numbers of a vector as dot() takes them; dot(pair, vector,
// pair's number in it, sum); scale(block).

#if defined(__AVX512BF16__)

// Of each code without its sign the two bytes of its number in bf16.
struct Fp8Numbers {
  alignas(64) uint8_t lower[128], upper[128];
  constexpr Fp8Numbers() : lower{}, upper{} {
    for (int code = 1; code < 128; ++code) {
      int exponent = code >> 3, fraction = code & 7;
      exponent ? fraction += 8 : ++exponent;
      for (; fraction < 8; fraction *= 2) --exponent;
      const int bits = (exponent + 120) << 7 | (fraction & 7) << 4;
      lower[code] = static_cast<uint8_t>(bits & 255);
      upper[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

constexpr Fp8Numbers kFp8Numbers;

struct Fp8 {
  using Pair = __m512bh;
  using Stored = uint16_t;

  static inline void expand(const uint8_t* codes, Pair* two) {
    // Rows' pairs beside each other: of four rows those of columns 0 and 1, then of 2 and 3, so that joining lower and
    // upper bytes gives a register of each.
    const __m512i order = _mm512_setr_epi32(0x11011000, 0x13031202, 0x31213020, 0x33233222,  //
                                            0x15051404, 0x17071606, 0x35253424, 0x37273626,  //
                                            0x19091808, 0x1b0b1a0a, 0x39293828, 0x3b2b3a2a,  //
                                            0x1d0d1c0c, 0x1f0f1e0e, 0x3d2d3c2c, 0x3f2f3e2e);
    const __m512i paired = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(codes));
    const __m512i lower = look_up(paired, kFp8Numbers.lower);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i upper = _mm512_ternarylogic_epi32(paired, sign, look_up(paired, kFp8Numbers.upper), 0xea);  // (a & b) | c
    two[0] = reinterpret_cast<Pair>(_mm512_unpacklo_epi8(lower, upper));
    two[1] = reinterpret_cast<Pair>(_mm512_unpackhi_epi8(lower, upper));
  }
  static inline void store(Stored* to, Pair pair) { _mm512_store_si512(to, reinterpret_cast<__m512i>(pair)); }
  static inline Pair load(const Stored* at) { return reinterpret_cast<Pair>(_mm512_load_si512(at)); }
  static inline const Rounded* vector(const Rounded* x, int64_t, Rounded*) { return x; }
  static inline Vec dot(Pair pair, const Rounded* x, int64_t number, Vec sum) {
    int32_t both;
    memcpy(&both, x + 2 * number, sizeof both);
    return {_mm512_dpbf16_ps(sum.all, pair, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)))};
  }
  static inline float scale(const uint8_t* block) { return fp8_scale(block); }

 private:
  static inline __m512i look_up(__m512i codes, const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  }
};

#else

struct Fp8 {
  struct Pair {
    Vec odd, even;
  };
  using Stored = float;

  static inline void expand(const uint8_t* codes, Pair* two) {
    two[0] = {column(codes + kGroupRows), column(codes)};
    two[1] = {column(codes + 3 * kGroupRows), column(codes + 2 * kGroupRows)};
  }
  static inline void store(Stored* to, const Pair& pair) {  // raised here, then, and not in every vector
    Vec::store(to, Vec::mul(pair.odd, Vec::splat(kRaised)));
    Vec::store(to + kLanes, Vec::mul(pair.even, Vec::splat(kRaised)));
  }
  static inline Pair load(const Stored* at) { return {Vec::load(at), Vec::load(at + kLanes)}; }
  static inline const Rounded* vector(const Rounded* x, int64_t n, Rounded* raised) {
    for (int64_t k = 0; k < n; k += kLanes) Vec::store(raised + k, Vec::mul(Vec::load(x + k), Vec::splat(kRaised)));
    return raised;
  }
  static inline Vec dot(const Pair& pair, const Rounded* x, int64_t number, Vec sum) {
    const Rounded* odd = x + number / kLanes * kPairColumns + number % kLanes;
    return Vec::fma(pair.even, Vec::splat(odd[kLanes]), Vec::fma(pair.odd, Vec::splat(odd[0]), sum));
  }
  static inline float scale(const uint8_t* block) { return fp8_scale(block) * kMissing; }

 private:
  // column() gives numbers that are 2^-120 or 2^-8 of what they mean: times kRaised, 2^-40 or 2^-8.
#if defined(__AVX2__)
  static constexpr float kRaised = 0x1p80f, kMissing = 0x1p40f;
#else
  static constexpr float kRaised = 1.0f, kMissing = 0x1p8f;
#endif
  // The numbers of 16 rows in one column. An f32's bits take less time to make than an f16's to be widened (Zen 4: 27 and
  // 19 GB/s of codes in cache). Subnormals, one code in some ten thousand, are then denormal, and Intel's processors spend
  // 150 cycles on a product with one. Products would all be, but for the other factor, which is raised.
  static inline Vec column(const uint8_t* at) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m512i sign_and_rest = _mm512_set1_epi32(static_cast<int32_t>(0x87f00000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(wide, 20), sign_and_rest))};
#elif defined(__AVX2__)
    const auto eight = [](const uint8_t* codes) {
      const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
      const __m256i sign_and_rest = _mm256_set1_epi32(static_cast<int32_t>(0x87f00000));
      return _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(wide, 20), sign_and_rest));
    };
    return {eight(at), eight(at + 8)};
#else
    uint16_t halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>((at[i] & 0x80) << 8 | (at[i] & 0x7f) << 7);
    return Vec::load_f16(halves);
#endif
  }
};

#endif

// Of a block's columns those that a product has to do with, whole pairs by fours.
inline int64_t fp8_columns(int64_t left) { return padded(left < kFp8Columns ? left : kFp8Columns); }

// One token: 16 rows of each of S streams that are `apart` bytes from each other, expanded as they come.
template <int S>
inline void fp8_one(const uint8_t* weights, int64_t apart, int64_t columns, Ahead* ahead, const Rounded* x,
                    float (*out)[kGroupRows]) {
  Vec totals[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) totals[s] = Vec::zero();
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = fp8_columns(columns - first);
    alignas(64) Rounded memory[kFp8Columns];
    const Rounded* vector = Fp8::vector(x + first, padded_pairs(n), memory);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint8_t* block = weights + s * apart;
      const uint8_t* codes = block + kFp8Head;
      Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
      for (int64_t k = 0; k < n; k += 8)
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          fetch<64>(ahead->at + s * apart + (k + 2 * i) * kGroupRows);
          Fp8::Pair two[2];
          Fp8::expand(codes + (k + 2 * i) * kGroupRows, two);
          sums[i] = Fp8::dot(two[0], vector, k / 2 + i, sums[i]);
          sums[i + 1] = Fp8::dot(two[1], vector, k / 2 + i + 1, sums[i + 1]);
        }
      const Vec sum = plus(plus(sums[3], sums[2]), plus(sums[1], sums[0]));
      totals[s] = Vec::fma(sum, Vec::splat(Fp8::scale(block)), totals[s]);
    }
    ahead->step(kFp8Bytes);
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) Vec::store(out[s], totals[s]);
}

// A block's expanded weights with T tokens; adds to `out`. Two of the four sums at once, so that they fit registers.
template <int T>
inline void fp8_block(const Fp8::Stored* w, int64_t n, const Rounded* const* x, float scale, float (*out)[kGroupRows]) {
  constexpr int64_t kPair = 2 * kGroupRows;  // numbers
  Vec half[2][T];
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    Vec first[T], second[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) first[t] = second[t] = Vec::zero();
    for (int64_t p = 2 * part; p < n / 2; p += 4) {
      const Fp8::Pair one = Fp8::load(w + p * kPair), other = Fp8::load(w + (p + 1) * kPair);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) first[t] = Fp8::dot(one, x[t], p, first[t]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) second[t] = Fp8::dot(other, x[t], p + 1, second[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) half[part][t] = plus(second[t], first[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    Vec::store(out[t], Vec::fma(plus(half[1][t], half[0][t]), Vec::splat(scale), Vec::load(out[t])));
}

// A block's expanded weights with all tokens, T at a time, and what is left then by fewer.
template <int T>
inline void fp8_tokens(const Fp8::Stored* w, int64_t n, const void* const* tokens, int64_t count, int64_t column,
                       float scale, float (*out)[kGroupRows]) {
  const Rounded* x[T];
  int64_t t = 0;
  for (; t + T <= count; t += T) {
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) x[i] = static_cast<const Rounded*>(tokens[t + i]) + column;
    fp8_block<T>(w, n, x, scale, out + t);
  }
  if constexpr (T > 1) fp8_tokens<(T > 4 ? 4 : T - 1)>(w, n, tokens + t, count - t, column, scale, out + t);
}

// Several tokens: a block is expanded once, into the first cache, for all of them. It is fetched ahead on every processor:
// those that fetch by themselves lose the thread meanwhile (Zen 4, 8 tokens, 4096 columns: 51 and 70 GMAC/s).
inline void fp8_some(const uint8_t* weights, int64_t columns, Ahead* ahead, const void* const* tokens,
                     int64_t count, float (*out)[kGroupRows]) {
  alignas(64) Fp8::Stored wide[kFp8Columns * kGroupRows];
  memset(out, 0, count * sizeof *out);
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = fp8_columns(columns - first);
    for (int64_t k = 0; k < n; k += 4) {
      __builtin_prefetch(ahead->at + k * kGroupRows);
      Fp8::Pair two[2];
      Fp8::expand(weights + kFp8Head + k * kGroupRows, two);
      Fp8::store(wide + k * kGroupRows, two[0]);
      Fp8::store(wide + (k + 2) * kGroupRows, two[1]);
    }
    ahead->step(kFp8Bytes);
    fp8_tokens<kBlockTokens>(wide, n, tokens, count, first, Fp8::scale(weights), out);
  }
}

// S times `groups` groups of 16 rows, from row `first` on, with the only token.
template <int S>
inline void fp8_streams(const Product& p, int64_t first, int64_t groups) {
  const int64_t group_bytes = (p.columns + kFp8Columns - 1) / kFp8Columns * kFp8Bytes, apart = groups * group_bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights) + first / kGroupRows * group_bytes;
  Ahead ahead(weights, apart, kFp8Bytes, p.next, S);
  for (int64_t g = 0; g < groups; ++g, weights += group_bytes) {
    alignas(64) float out[S][kGroupRows];
    fp8_one<S>(weights, apart, p.columns, &ahead, static_cast<const Rounded*>(p.x[0]), out);
    for (int s = 0; s < S; ++s) store_group(p, 0, first + (s * groups + g) * kGroupRows, out[s]);
  }
}

void multiply_fp8(const Product& p) {
  const int64_t groups = (p.rows + kGroupRows - 1) / kGroupRows;
  if (p.tokens == 1) {
    const int64_t each = groups / kStreams;
    if (each) fp8_streams<kStreams>(p, 0, each);
    if (each * kStreams < groups) fp8_streams<1>(p, each * kStreams * kGroupRows, groups - each * kStreams);
    return;
  }
  constexpr int64_t kMost = 96;  // tokens whose sums wait in memory: 6 KiB
  const int64_t row_bytes = (p.columns + kFp8Columns - 1) / kFp8Columns * kFp8Bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  Ahead ahead(weights, groups * row_bytes, kFp8Bytes, p.next, 1);
  alignas(64) float out[kMost][kGroupRows];
  for (int64_t row = 0; row < p.rows; row += kGroupRows, weights += row_bytes) {
    for (int64_t token = 0; token < p.tokens; token += kMost) {
      const int64_t tokens = p.tokens - token < kMost ? p.tokens - token : kMost;
      fp8_some(weights, p.columns, &ahead, p.x + token, tokens, out);
      for (int64_t t = 0; t < tokens; ++t) store_group(p, token + t, row, out[t]);
    }
  }
}

}  // namespace
}  // namespace moehive
