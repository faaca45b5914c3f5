// The product of stored rows with a few vectors, written once and compiled for each instruction set.
//
// The including file defines `Vec` in its anonymous namespace: 16 floats with zero(), load(const float*),
// load_odd(const uint16_t*) and load_even (of 32 numbers of bf16), load_f16(const uint16_t*), fma(a, b, sum), sum(v); and the
// sizes of its register tiles, kRowsForOne (rows at once for one token), kRows and kTokens (for more). kSumsAtOnce is how
// many registers a function sums(v, to) adds up, or 0. Nothing here has external linkage, nor uses the standard library:
// else the linker might keep an AVX-512 copy of a shared function.
#pragma once

#include <string.h>

#include "activation-inl.h"
#include "bf16-inl.h"
#include "block-inl.h"
#include "fp8-inl.h"
#include "kernel.h"

namespace moehive {
namespace {

constexpr int64_t kBytesAhead = 2 << 10;  // of each stream; 1 to 4 KiB are the same within the noise

// Formats' numbers: kColumns of them in kParts registers, each for the same part of a vector's.
struct F32 {
  using Stored = float;
  using Number = float;
  using Wide = Vec;
  static constexpr int64_t kColumns = kLanes;
  static constexpr int kParts = 1;
  template <int>
  static inline Vec load(const float* at) {
    return Vec::load(at);
  }
  static inline Vec vector(const float* x) { return Vec::load(x); }
  static inline Vec fma(Vec w, Vec x, Vec sum) { return Vec::fma(w, x, sum); }
};

struct F16 : F32 {
  using Stored = uint16_t;
  template <int>
  static inline Vec load(const uint16_t* at) {
    return Vec::load_f16(at);
  }
};

// Adds the products of W::kColumns columns: rows `stride` apart from `w` on, with vectors' numbers from `k` on.
template <class W, int R, int T, int Part = 0>
inline void add_columns(const typename W::Stored* w, int64_t stride, const typename W::Number* const* x, int64_t k,
                        Vec (*sums)[R]) {
  typename W::Wide wide[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) wide[r] = W::template load<Part>(w + r * stride);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const typename W::Wide xs = W::vector(x[t] + k + Part * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[t][r] = W::fma(wide[r], xs, sums[t][r]);
  }
  if constexpr (Part + 1 < W::kParts) add_columns<W, R, T, Part + 1>(w, stride, x, k, sums);
}

// The sums of N registers.
template <int N, class Register>
inline void add_lanes(const Register* of, float* sums) {
  if constexpr (kSumsAtOnce > 0 && N >= kSumsAtOnce) {
    Register::sums(of, sums);
    add_lanes<N - kSumsAtOnce>(of + kSumsAtOnce, sums + kSumsAtOnce);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) sums[i] = Register::sum(of[i]);
  }
}

// R rows, `apart` rows from each other, with T tokens: R * T sums in registers.
//
// Each of the R rows is the front of a stream that runs through contiguous memory; while a row is multiplied, what
// its stream needs next is fetched, since the processor's own prefetcher stops at each page of 4 KiB. Measured on one
// Zen 3 core, bf16, 100 MB, share of a plain one-stream read in the same run, one token / two tokens:
//     neighbouring rows, no prefetch         2048 columns 0.77 / 0.58
//     neighbouring rows, next rows fetched   2048 columns 1.05 / 0.90, 512 columns 0.58 / 0.56
//     rows apart, next rows fetched          2048 columns 1.25 / 1.02, 512 columns 1.25 / 1.02
// For all tokens but the first, which find the rows in the second cache, they are neighbours (`Neighbours`), so that a
// token's sums are stored as one piece, and have whole registers of columns: what deals with a rest would keep the sums
// in memory. Zen 4, 512 and 2048 columns: 86 and 100 billion products a second apart, 110 and 113 so, of 117 that it
// can do.
template <class W, int R, int T, bool Neighbours>
inline void tile(const Product& p, int64_t row, int64_t apart, int64_t token) {
  using Stored = typename W::Stored;
  const int64_t columns = p.columns;
  const Stored* first = static_cast<const Stored*>(p.weights);
  const Stored* w = first + row * columns;
  const Stored* ahead;
  const Stored* const then = token + T < p.tokens ? first : static_cast<const Stored*>(p.next);
  if constexpr (Neighbours) {
    ahead = row + 2 * R <= p.rows ? w + R * columns : then;
  } else {
    const int64_t row_ahead = row + kBytesAhead / (columns * static_cast<int64_t>(sizeof(Stored))) + 1;
    ahead = row_ahead < apart ? first + row_ahead * columns : then + (row_ahead - apart) * columns;
  }
  const typename W::Number* x[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) x[t] = static_cast<const typename W::Number*>(p.x[token + t]);
  Vec sums[T][R] = {};
  const int64_t stride = apart * columns;
  int64_t k = 0;
  for (; k + W::kColumns <= columns; k += W::kColumns) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) fetch<1>(ahead + r * stride + k);
    add_columns<W, R, T>(w + k, stride, x, k, sums);
  }
  if (!Neighbours && k < columns) {  // zeros, in every format of bits that are zeros, stand in for what is behind the row
    Stored rest[R][W::kColumns] = {};
    for (int r = 0; r < R; ++r) memcpy(rest[r], w + r * stride + k, (columns - k) * sizeof(Stored));
    add_columns<W, R, T>(rest[0], W::kColumns, x, k, sums);
  }
  float all[T][R];
  add_lanes<R * T>(sums[0], all[0]);
  for (int t = 0; t < T; ++t) {
    float* const to = p.out + (token + t) * p.out_stride + row;
    if constexpr (Neighbours) {
      memcpy(to, all[t], sizeof all[t]);
    } else {
      for (int r = 0; r < R; ++r) to[r * apart] = all[t][r];
    }
  }
}

// All rows with the tokens token .. token + T.
template <class W, int R, int T, bool Neighbours>
inline void rows_of(const Product& p, int64_t token) {
  const int64_t tiles = p.rows / R;
  for (int64_t i = 0; i < tiles; ++i)
    tile<W, R, T, Neighbours>(p, Neighbours ? i * R : i, Neighbours ? 1 : tiles, token);
  for (int64_t row = tiles * R; row < p.rows; ++row) tile<W, 1, T, Neighbours>(p, row, p.rows, token);
}

// Tokens outside, rows inside: a tile's vectors stay in the first cache while the rows come from memory (for the
// first tokens) or from the second cache (for the others).
template <class W, int T = kTokens>
void multiply_as(const Product& p, int64_t token = 0) {
  constexpr int R = T == 1 ? kRowsForOne : kRows;
  const bool whole = p.columns % W::kColumns == 0;
  for (; token + T <= p.tokens; token += T)
    token > 0 && whole ? rows_of<W, R, T, true>(p, token) : rows_of<W, R, T, false>(p, token);
  if constexpr (T > 1) multiply_as<W, (T > 4 ? 4 : T - 1)>(p, token);
}

void multiply(const Product& p) {
  switch (p.format) {
    case Format::f32: return multiply_as<F32>(p);
    case Format::bf16: {
      const FlushDenormals flush;
      return multiply_as<Bf16>(p);
    }
    case Format::f16: return multiply_as<F16>(p);
    case Format::fp8_block: return multiply_fp8(p);
    default: return multiply_blocks(p);
  }
}

}  // namespace
}  // namespace moehive
