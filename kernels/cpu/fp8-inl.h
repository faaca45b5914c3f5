// Products of FP8 weights with vectors of f32, written once and compiled for each instruction set.
//
// E4M3: 1 sign, 4 exponent (bias 7), 3 fraction bits; subnormals; no infinities; largest 448; S.1111.111 is no number
// and is kept out by whoever packs. A block of 128 x 128 shares one f32 scale. Shifted into the bits of an f16 or f32,
// a code means its number times a power of two, subnormals too: so it is expanded exactly, and the power is made up for
// in the other factor and in the scale.
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

// expand() gives numbers that are 2^-120 or 2^-8 of what they mean: times kFp8Raised, 2^-40 or 2^-8.
#if defined(__AVX2__)
constexpr float kFp8Raised = 0x1p80f, kFp8Missing = 0x1p40f;
#else
constexpr float kFp8Raised = 1.0f, kFp8Missing = 0x1p8f;
#endif

// The numbers of 16 rows in one column. An f32's bits take less time to make than an f16's to be widened (Zen 4: 27 and
// 19 GB/s of codes in cache). Subnormals, one code in some ten thousand, are then denormal, and Intel's processors spend
// 150 cycles on a product with one. Products would all be, but for the other factor, which is raised: it may be up to
// 2^47, and is exact below.
inline Vec expand(const uint8_t* at) {
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

inline float fp8_scale(const uint8_t* block) {
  float scale;
  memcpy(&scale, block, sizeof scale);
  return scale * kFp8Missing;
}

inline Vec plus(Vec a, Vec b) { return Vec::fma(a, Vec::splat(1.0f), b); }

// One token: 16 rows of each of S streams that are `apart` bytes from each other, expanded as they come.
template <int S>
inline void fp8_one(const uint8_t* weights, int64_t apart, int64_t columns, Ahead* ahead, const float* x,
                    float (*out)[kGroupRows]) {
  Vec totals[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) totals[s] = Vec::zero();
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = padded(columns - first < kFp8Columns ? columns - first : kFp8Columns);
    alignas(64) float raised[kFp8Columns];
    for (int64_t k = 0; k < n; k += kLanes)
      Vec::store(raised + k, Vec::mul(Vec::load(x + first + k), Vec::splat(kFp8Raised)));
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint8_t* block = weights + s * apart;
      const uint8_t* codes = block + kFp8Head;
      Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
      for (int64_t k = 0; k < n; k += 4) {
        fetch<64>(ahead->at + s * apart + k * kGroupRows);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sums[i] = Vec::fma(expand(codes + (k + i) * kGroupRows), Vec::splat(raised[k + i]), sums[i]);
      }
      const Vec sum = plus(plus(sums[3], sums[2]), plus(sums[1], sums[0]));
      totals[s] = Vec::fma(sum, Vec::splat(fp8_scale(block)), totals[s]);
    }
    ahead->step(kFp8Bytes);
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) Vec::store(out[s], totals[s]);
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

// A block's expanded weights with all tokens, T at a time, and what is left then by fewer.
template <int T>
inline void fp8_tokens(const float* w, int64_t n, const void* const* tokens, int64_t count, int64_t column, float scale,
                       float (*out)[kGroupRows]) {
  const float* x[T];
  int64_t t = 0;
  for (; t + T <= count; t += T) {
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) x[i] = static_cast<const float*>(tokens[t + i]) + column;
    fp8_block<T>(w, n, x, scale, out + t);
  }
  if constexpr (T > 1) fp8_tokens<(T > 4 ? 4 : T - 1)>(w, n, tokens + t, count - t, column, scale, out + t);
}

// Several tokens: a block is expanded once, into the first cache, for all of them.
inline void fp8_some(const uint8_t* weights, int64_t columns, Ahead* ahead, const void* const* tokens,
                     int64_t count, float (*out)[kGroupRows]) {
  alignas(64) float wide[kFp8Columns * kGroupRows];
  memset(out, 0, count * sizeof *out);
  for (int64_t first = 0; first < columns; first += kFp8Columns, weights += kFp8Bytes) {
    const int64_t n = padded(columns - first < kFp8Columns ? columns - first : kFp8Columns);
    for (int64_t k = 0; k < n; ++k) {
      fetch<1>(ahead->at + k * kGroupRows);
      Vec::store(wide + k * kGroupRows, Vec::mul(expand(weights + kFp8Head + k * kGroupRows), Vec::splat(kFp8Raised)));
    }
    ahead->step(kFp8Bytes);
    const float scale = fp8_scale(weights);
    fp8_tokens<kBlockTokens>(wide, n, tokens, count, first, scale, out);
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
    fp8_one<S>(weights, apart, p.columns, &ahead, static_cast<const float*>(p.x[0]), out);
    for (int s = 0; s < S; ++s) {
      const int64_t row = first + (s * groups + g) * kGroupRows;
      const int64_t count = p.rows - row < kGroupRows ? p.rows - row : kGroupRows;
      for (int64_t r = 0; r < count; ++r) p.out[(row + r) * p.out_stride] = out[s][r];
    }
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
  constexpr int64_t kMost = 48;  // tokens whose sums wait in memory: 3 KiB
  const int64_t row_bytes = (p.columns + kFp8Columns - 1) / kFp8Columns * kFp8Bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  Ahead ahead(weights, groups * row_bytes, kFp8Bytes, p.next, 1);
  alignas(64) float out[kMost][kGroupRows];
  for (int64_t row = 0; row < p.rows; row += kGroupRows, weights += row_bytes) {
    const int64_t rows = p.rows - row < kGroupRows ? p.rows - row : kGroupRows;
    for (int64_t token = 0; token < p.tokens; token += kMost) {
      const int64_t tokens = p.tokens - token < kMost ? p.tokens - token : kMost;
      fp8_some(weights, p.columns, &ahead, p.x + token, tokens, out);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < tokens; ++t) p.out[(row + r) * p.out_stride + token + t] = out[t][r];
    }
  }
}

}  // namespace
}  // namespace moehive
