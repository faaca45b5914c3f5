// Products of FP8 weights with vectors of f32, written once and compiled for each instruction set.
//
// E4M3: 1 sign, 4 exponent (bias 7), 3 fraction bits; subnormals; no infinities; largest 448; S.1111.111 is no number
// and is kept out by whoever packs. A block of 128 x 128 shares one f32 scale. Shifted into the bits of an f16 or f32,
// a code means its number times a power of two, subnormals too: so it is expanded exactly.
//
//     block    [f32 scale] [12 bytes of zeros] [128 columns x 16 rows]       for each 128 columns of 16 rows
//
// Rows are padded to 16, columns to 128, with zeros.
//
// The sum of a block: its columns k, k + 4, k + 8, ... one after the other by fused multiply-add, then the four sums;
// blocks are added in order by fma with their scale. The bits are the same everywhere, for any number of tokens and threads.
#pragma once

#include <string.h>

#include "kernel.h"

namespace moehive {
namespace {

constexpr int64_t kFp8Head = 16;
constexpr float kFp8Missing = 0x1p8f;  // in the numbers of load_e4m3

// The numbers of 16 rows in one column, by way of f16. Shifted into the bits of an f32 they would take fewer steps, but
// subnormals would be denormal, and a product with one takes Intel's processors 150 cycles.
inline Vec load_e4m3(const uint8_t* at) {
#if defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
#if defined(__AVX512F__)
  return {_mm512_cvtph_ps(halves)};
#else
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
#else
  uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>((at[i] & 0x80) << 8 | (at[i] & 0x7f) << 7);
  return Vec::load_f16(halves);
#endif
}

inline float fp8_scale(const uint8_t* block) {
  float scale;
  memcpy(&scale, block, sizeof scale);
  return scale * kFp8Missing;
}

inline Vec plus(Vec a, Vec b) { return Vec::fma(a, Vec::splat(1.0f), b); }

// One token: weights are expanded as they come.
inline void fp8_one(const uint8_t* weights, int64_t columns, Ahead* ahead, const float* x, float* out) {
  Vec total = Vec::zero();
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = padded(columns - first < kFp8Columns ? columns - first : kFp8Columns);
    const float* here = x + first;
    const uint8_t* w = weights + kFp8Head;
    Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for (int64_t k = 0; k < n; k += 4) {
      __builtin_prefetch(ahead->at + k * kGroupRows);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = Vec::fma(load_e4m3(w + (k + i) * kGroupRows), Vec::splat(here[k + i]), sums[i]);
    }
    total = Vec::fma(plus(plus(sums[3], sums[2]), plus(sums[1], sums[0])), Vec::splat(fp8_scale(weights)), total);
    ahead->step(kFp8Bytes);
  }
  Vec::store(out, total);
}

// A block's expanded weights with T tokens; adds to `out`. Two of the four sums at once, so that they fit registers.
template <int T>
inline void fp8_block(const float* w, int64_t n, const float* const* x, float scale, float (*out)[kGroupRows]) {
  Vec pair[2][T];
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    Vec even[T], odd[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) even[t] = odd[t] = Vec::zero();
    for (int64_t k = 2 * part; k < n; k += 4) {
      const Vec first = Vec::load(w + k * kGroupRows), second = Vec::load(w + (k + 1) * kGroupRows);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) even[t] = Vec::fma(first, Vec::splat(x[t][k]), even[t]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) odd[t] = Vec::fma(second, Vec::splat(x[t][k + 1]), odd[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) pair[part][t] = plus(odd[t], even[t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    Vec::store(out[t], Vec::fma(plus(pair[1][t], pair[0][t]), Vec::splat(scale), Vec::load(out[t])));
}

// Several tokens: a block is expanded once, into the first cache, for all of them.
inline void fp8_some(const uint8_t* weights, int64_t columns, Ahead* ahead, const void* const* tokens,
                     int64_t count, float (*out)[kGroupRows]) {
  alignas(64) float wide[kFp8Columns * kGroupRows];
  memset(out, 0, count * sizeof *out);
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = padded(columns - first < kFp8Columns ? columns - first : kFp8Columns);
    for (int64_t k = 0; k < n; ++k) {
      __builtin_prefetch(ahead->at + k * kGroupRows);
      Vec::store(wide + k * kGroupRows, load_e4m3(weights + kFp8Head + k * kGroupRows));
    }
    ahead->step(kFp8Bytes);
    const float scale = fp8_scale(weights);
    const float* x[kBlockTokens];
    int64_t t = 0;
    const auto next = [&](int64_t some) {
      for (int64_t i = 0; i < some; ++i)
        x[i] = static_cast<const float*>(tokens[t + i]) + first;
    };
    for (; t + kBlockTokens <= count; t += kBlockTokens) {
      next(kBlockTokens);
      fp8_block<kBlockTokens>(wide, n, x, scale, out + t);
    }
    for (; t < count; ++t) {
      next(1);
      fp8_block<1>(wide, n, x, scale, out + t);
    }
  }
}

void multiply_fp8(const Product& p) {
  constexpr int64_t kMost = 48;  // tokens whose sums wait in memory: 3 KiB
  const int64_t row_bytes = (p.columns + kFp8Columns - 1) / kFp8Columns * kFp8Bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  Ahead ahead(weights, rows_bytes(Format::fp8_block, p.rows, p.columns), kFp8Bytes, p.next, 1);
  alignas(64) float out[kMost][kGroupRows];
  for (int64_t row = 0; row < p.rows; row += kGroupRows, weights += row_bytes) {
    const int64_t rows = p.rows - row < kGroupRows ? p.rows - row : kGroupRows;
    for (int64_t token = 0; token < p.tokens; token += kMost) {
      const int64_t tokens = p.tokens - token < kMost ? p.tokens - token : kMost;
      if (tokens == 1)
        fp8_one(weights, p.columns, &ahead, static_cast<const float*>(p.x[token]), out[0]);
      else
        fp8_some(weights, p.columns, &ahead, p.x + token, tokens, out);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < tokens; ++t) p.out[(row + r) * p.out_stride + token + t] = out[t][r];
    }
  }
}

}  // namespace
}  // namespace moehive
