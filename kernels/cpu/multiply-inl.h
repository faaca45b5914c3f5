// The product of stored rows with a few vectors, written once and compiled for each instruction set.
//
// The including file defines `Vec` in its anonymous namespace: 16 floats with zero(), load(const float*),
// load_bf16(const uint16_t*), load_f16(const uint16_t*), fma(a, b, sum), sum(v); and the sizes of its register
// tiles, kRowsForOne (rows at once for one token), kRows and kTokens (for more). Nothing here has external
// linkage, nor uses the standard library: else the linker might keep an AVX-512 copy of a shared function.
#pragma once

#include <string.h>

#include "activation-inl.h"
#include "block-inl.h"
#include "fp8-inl.h"
#include "kernel.h"

namespace moehive {
namespace {

constexpr int64_t kBytesAhead = 2 << 10;  // of each stream; 1 to 4 KiB are the same within the noise

struct F32 {
  using Stored = float;
  static inline Vec load(const float* at) { return Vec::load(at); }
};

struct Bf16 {
  using Stored = uint16_t;
  static inline Vec load(const uint16_t* at) { return Vec::load_bf16(at); }
};

struct F16 {
  using Stored = uint16_t;
  static inline Vec load(const uint16_t* at) { return Vec::load_f16(at); }
};

// R rows, `apart` rows from each other, with T tokens: R * T sums in registers.
//
// Each of the R rows is the front of a stream that runs through contiguous memory; while a row is multiplied, what
// its stream needs next is fetched, since the processor's own prefetcher stops at each page of 4 KiB. Measured on one
// Zen 3 core, bf16, 100 MB, share of a plain one-stream read in the same run, one token / two tokens:
//     neighbouring rows, no prefetch         2048 columns 0.77 / 0.58
//     neighbouring rows, next rows fetched   2048 columns 1.05 / 0.90, 512 columns 0.58 / 0.56
//     rows apart, next rows fetched          2048 columns 1.25 / 1.02, 512 columns 1.25 / 1.02
template <class W, int R, int T>
inline void tile(const Product& p, int64_t row, int64_t apart, int64_t token) {
  using Stored = typename W::Stored;
  const int64_t columns = p.columns;
  const Stored* first = static_cast<const Stored*>(p.weights);
  const Stored* w = first + row * columns;
  const int64_t row_ahead = row + kBytesAhead / (columns * static_cast<int64_t>(sizeof(Stored))) + 1;
  const Stored* ahead = first + row_ahead * columns;
  if (row_ahead >= apart) {
    ahead = (token + T < p.tokens ? first : static_cast<const Stored*>(p.next)) + (row_ahead - apart) * columns;
  }
  const float* x[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) x[t] = static_cast<const float*>(p.x[token + t]);
  Vec sums[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[r][t] = Vec::zero();

  const int64_t stride = apart * columns;
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    Vec wide[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      wide[r] = W::load(w + r * stride + k);
      fetch<1>(ahead + r * stride + k);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec xs = Vec::load(x[t] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][t] = Vec::fma(wide[r], xs, sums[r][t]);
    }
  }
  if (k < columns) {  // zeros (the number's bits are zeros in every format) stand in for what is behind the row
    for (int r = 0; r < R; ++r) {
      Stored rest[kLanes] = {};
      memcpy(rest, w + r * stride + k, (columns - k) * sizeof(Stored));
      const Vec wide = W::load(rest);
      for (int t = 0; t < T; ++t) sums[r][t] = Vec::fma(wide, Vec::load(x[t] + k), sums[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) p.out[(row + r * apart) * p.out_stride + token + t] = Vec::sum(sums[r][t]);
}

// All rows with the tokens token .. token + T.
template <class W, int R, int T>
inline void rows_of(const Product& p, int64_t token) {
  const int64_t apart = p.rows / R;
  for (int64_t row = 0; row < apart; ++row) tile<W, R, T>(p, row, apart, token);
  for (int64_t row = apart * R; row < p.rows; ++row) tile<W, 1, T>(p, row, p.rows, token);
}

// Tokens outside, rows inside: a tile's vectors stay in the first cache while the rows come from memory (for the
// first tokens) or from the second cache (for the others).
template <class W>
void multiply_as(const Product& p) {
  int64_t token = 0;
  for (; token + kTokens <= p.tokens; token += kTokens) rows_of<W, kRows, kTokens>(p, token);
  if (kTokens > 3 && token + 3 == p.tokens) rows_of<W, kRows, 3>(p, token);
  if (token + 2 == p.tokens) rows_of<W, kRows, 2>(p, token);
  if (token + 1 == p.tokens) rows_of<W, kRowsForOne, 1>(p, token);
}

void multiply(const Product& p) {
  switch (p.format) {
    case Format::f32: return multiply_as<F32>(p);
    case Format::bf16: return multiply_as<Bf16>(p);
    case Format::f16: return multiply_as<F16>(p);
    case Format::fp8_block: return multiply_fp8(p);
    default: return multiply_blocks(p);
  }
}

static_assert(kTokens >= 2 && kTokens <= 4, "multiply_as has no tile for the tokens that are left");

}  // namespace
}  // namespace moehive
