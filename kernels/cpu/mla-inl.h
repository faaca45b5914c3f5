// The arithmetic of mla.h, compiled for each instruction set by the including file.
#pragma once

#include "mla.h"
#include "vec8-inl.h"

namespace moehive {
namespace {

// Rotates `n` numbers by n / 2 angles; the result is in halves, whichever way the pairs lie.
inline void rotate(float* to, const float* from, const float* cos, const float* sin, int64_t n, bool interleaved) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float x = interleaved ? from[2 * i] : from[i], y = interleaved ? from[2 * i + 1] : from[i + half];
    to[i] = x * cos[i] - y * sin[i];
    to[i + half] = y * cos[i] + x * sin[i];
  }
}

// to[t][0 .. 8 * kWide) = sum over n of x[t][n] * rows[n][...], for kTokens tokens: kWide * kTokens sums in registers.
template <int kWide, int kTokens, class Stored>
inline void combine(const Stored* rows, int64_t stride, int64_t count, const float* const* x, float* const* to) {
  V sums[kTokens][kWide] = {};
  for (int64_t n = 0; n < count; ++n) {
    V wide[kWide];
#pragma GCC unroll 8
    for (int w = 0; w < kWide; ++w) wide[w] = load(rows + n * stride + w * kWidth);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const V factor = same(x[t][n]);
#pragma GCC unroll 8
      for (int w = 0; w < kWide; ++w) sums[t][w] = fma(factor, wide[w], sums[t][w]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
    for (int w = 0; w < kWide; ++w) store(to[t] + w * kWidth, sums[t][w]);
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bf16(x); }

// Columns column .. column + 8 * kWide of a head's matrix, for tokens that share it: first all of these columns become
// floats that lie together, since rows that are a power of two apart would throw each other out of the first cache.
template <int kWide, class Stored>
inline void combine_panel(const Stored* rows, int64_t stride, int64_t count, const float* const* x, float* const* to,
                          int64_t tokens, int64_t column) {
  alignas(64) float panel[kMaxNope * kWide * kWidth];
  for (int64_t n = 0; n < count; ++n)
    for (int64_t w = 0; w < kWide; ++w)
      store(panel + (n * kWide + w) * kWidth, load(rows + n * stride + column + w * kWidth));
  for (int64_t t = 0; t < tokens; t += 4) {
    const float* from[4];
    float* out[4];
    for (int64_t i = 0; i < 4; ++i) {  // what is missing repeats the last
      const int64_t at = t + i < tokens ? t + i : tokens - 1;
      from[i] = x[at];
      out[i] = to[at] + column;
    }
    combine<kWide, 4>(panel, kWide * kWidth, count, from, out);
  }
}

// Queries of one head into the latent space: absorbed = query * W_uk. At most kMlaTokens tokens.
template <class Stored>
void absorb_as(const MoehiveMla& layer, const MoehiveMlaCall& call, int64_t head, int64_t token, int64_t tokens) {
  const int64_t query = layer.nope + layer.rope, full = layer.rank + layer.rope, rank = layer.rank;
  const Stored* rows = static_cast<const Stored*>(layer.up) + head * (layer.nope + layer.value) * rank;
  const float* x[kMlaTokens];
  float* to[kMlaTokens];
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * layer.heads + head;
    x[t] = call.queries + at * query;
    to[t] = call.absorbed + at * full;
  }
  int64_t c = 0;
  if (tokens == 1) {  // the rows come from memory: longer pieces of them
    for (; c + 8 * kWidth <= rank; c += 8 * kWidth) {
      float* shifted = to[0] + c;
      combine<8, 1>(rows + c, rank, layer.nope, x, &shifted);
    }
  }
  for (; c + 2 * kWidth <= rank; c += 2 * kWidth) combine_panel<2>(rows, rank, layer.nope, x, to, tokens, c);
  for (; c < rank; ++c) {
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0.0f;
      for (int64_t n = 0; n < layer.nope; ++n) sum += x[t][n] * widen(rows[n * rank + c]);
      to[t][c] = sum;
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t angle = (token + t) * (layer.rope / 2);
    rotate(to[t] + rank, x[t] + layer.nope, call.cos + angle, call.sin + angle, layer.rope, layer.interleaved);
  }
}

void absorb(const MoehiveMla& layer, const MoehiveMlaCall& call, int64_t head, int64_t token, int64_t tokens) {
  return layer.half_up ? absorb_as<uint16_t>(layer, call, head, token, tokens)
                    : absorb_as<float>(layer, call, head, token, tokens);
}

// Number i of the page's token `slot`. The token after it is multiplied by zero until it comes, and must not be what no
// number is.
inline void put(float* page, int64_t i, int64_t slot, float x) { page[i * kPage + slot] = x; }
inline void put(uint16_t* page, int64_t i, int64_t slot, float x) {
  uint16_t* at = page + (i / 2 * kPage + slot) * 2 + i % 2;
  *at = to_bf16(x);
  if (slot % 2 == 0) at[2] = 0;
}

template <class Stored>
void append_as(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token) {
  const int64_t row = sequence.first + token, rank = layer.rank, angle = row * (layer.rope / 2);
  const float* from = call.compressed + row * call.compressed_row;
  float turned[kMaxRope];
  rotate(turned, from + rank, call.cos + angle, call.sin + angle, layer.rope, layer.interleaved);
  const int64_t position = sequence.start + token;
  Stored* page = reinterpret_cast<Stored*>(sequence.pages[position / kPage] + layer.page_at);
  const float scale = 1.0f / sqrtf(dot(from, from, rank) / static_cast<float>(rank) + layer.norm_eps);
  for (int64_t i = 0; i < rank; ++i) put(page, i, position % kPage, from[i] * scale * layer.norm[i]);
  for (int64_t i = 0; i < layer.rope; ++i) put(page, rank + i, position % kPage, turned[i]);
}

// Writes a token to its sequence's cache: the latent normed, the rotary key rotated.
void append(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token) {
  return layer.half ? append_as<uint16_t>(layer, call, sequence, token)
                    : append_as<float>(layer, call, sequence, token);
}

constexpr int64_t kTokensTogether = 4;  // tokens that share each row that is read

// products[q][k] of a few vectors and a few rows: eight sums in registers. One's bits depend on nothing else.
template <int kQueries, int kKeys, class Stored>
inline void multiply(const float* const* query, const Stored* const* keys, int64_t n, float (*products)[8]) {
  V sums[kQueries][kKeys] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    V wide[kKeys];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) wide[k] = load(keys[k] + i);
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const V part = load(query[q] + i);
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) sums[q][k] = fma(part, wide[k], sums[q][k]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
      float total = sum(sums[q][k]);
      for (int64_t rest = i; rest < n; ++rest) total += query[q][rest] * widen(keys[k][rest]);
      products[q][k] = total;
    }
  }
}

// One head's weighted latents to its values: out = W_uv * latent.
template <class Stored>
void expand_as(const MoehiveMla& layer, const MoehiveMlaCall& call, int64_t head, int64_t token, int64_t tokens) {
  const int64_t full = layer.rank + layer.rope, rank = layer.rank;
  const Stored* rows = static_cast<const Stored*>(layer.up) + (head * (layer.nope + layer.value) + layer.nope) * rank;
  const auto latent = [&](int64_t t) { return call.absorbed + ((token + t) * layer.heads + head) * full; };
  const auto out = [&](int64_t t) { return call.out + ((token + t) * layer.heads + head) * layer.value; };
  const int64_t step = tokens == 1 ? 8 : 2;
  for (int64_t r = 0; r < layer.value; r += step) {
    const int64_t wide = layer.value - r < step ? layer.value - r : step;
    const Stored* from[8];
    for (int64_t k = 0; k < step; ++k) from[k] = rows + (r + (k < wide ? k : wide - 1)) * rank;
    for (int64_t t = 0; t < tokens; t += kTokensTogether) {
      const int64_t here = tokens - t < kTokensTogether ? tokens - t : kTokensTogether;
      const float* query[kTokensTogether];
      float products[kTokensTogether][8];
      for (int64_t i = 0; i < kTokensTogether; ++i) query[i] = latent(t + (i < here ? i : here - 1));
      if (tokens == 1) {
        multiply<1, 8>(query, from, rank, products);
      } else {
        multiply<kTokensTogether, 2>(query, from, rank, products);
      }
      for (int64_t i = 0; i < here; ++i) memcpy(out(t + i) + r, products[i], wide * sizeof(float));
    }
  }
}

void expand(const MoehiveMla& layer, const MoehiveMlaCall& call, int64_t head, int64_t token, int64_t tokens) {
  return layer.half_up ? expand_as<uint16_t>(layer, call, head, token, tokens)
                    : expand_as<float>(layer, call, head, token, tokens);
}

}  // namespace
}  // namespace moehive
