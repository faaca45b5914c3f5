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

template <class Stored>
inline Stored* cached_row(const MoehiveMla& layer, const MoehiveSequence& sequence, int64_t position) {
  const uint64_t page = sequence.pages[position / kPage] + layer.page_at;
  return reinterpret_cast<Stored*>(page) + position % kPage * (layer.rank + layer.rope);
}

inline void put(float* at, float x) { *at = x; }
inline void put(uint16_t* at, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *at = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Stored>
void append_as(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token) {
  const int64_t row = sequence.first + token, rank = layer.rank, angle = row * (layer.rope / 2);
  const float* from = call.compressed + row * call.compressed_row;
  float turned[kMaxRope];
  rotate(turned, from + rank, call.cos + angle, call.sin + angle, layer.rope, layer.interleaved);
  Stored* to = cached_row<Stored>(layer, sequence, sequence.start + token);
  const float scale = 1.0f / sqrtf(dot(from, from, rank) / static_cast<float>(rank) + layer.norm_eps);
  for (int64_t i = 0; i < rank; ++i) put(to + i, from[i] * scale * layer.norm[i]);
  for (int64_t i = 0; i < layer.rope; ++i) put(to + rank + i, turned[i]);
}

// Writes a token to its sequence's cache: the latent normed, the rotary key rotated.
void append(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token) {
  return layer.half ? append_as<uint16_t>(layer, call, sequence, token)
                    : append_as<float>(layer, call, sequence, token);
}

// scores[q][key] for a few queries with a few keys: eight sums in registers. A score's bits depend on nothing else.
template <int kQueries, int kKeys, class Stored>
inline void score(const float* const* query, const Stored* const* keys, int64_t n, float scale, float (*scores)[kPage]) {
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
      scores[q][k] = total * scale;
    }
  }
}

// sums[h] = sums[h] * fade[h] + the latents weighted by scores[h].
template <class Stored>
inline void weigh(float (*sums)[kMaxRank], const float* fade, const float (*scores)[kPage],
                  const Stored* const* latents, int64_t keys, int64_t rank) {
  int64_t c = 0;
  for (; c + 2 * kWidth <= rank; c += 2 * kWidth) {
    V total[kHeadsTogether][2];
#pragma GCC unroll 4
    for (int h = 0; h < kHeadsTogether; ++h) {
      total[h][0] = load(sums[h] + c) * fade[h];
      total[h][1] = load(sums[h] + c + kWidth) * fade[h];
    }
    for (int64_t key = 0; key < keys; ++key) {
      const V low = load(latents[key] + c), high = load(latents[key] + c + kWidth);
#pragma GCC unroll 4
      for (int h = 0; h < kHeadsTogether; ++h) {
        const V score = same(scores[h][key]);
        total[h][0] = fma(score, low, total[h][0]);
        total[h][1] = fma(score, high, total[h][1]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeadsTogether; ++h) {
      store(sums[h] + c, total[h][0]);
      store(sums[h] + c + kWidth, total[h][1]);
    }
  }
  for (; c < rank; ++c) {
    for (int h = 0; h < kHeadsTogether; ++h) {
      float total = sums[h][c] * fade[h];
      for (int64_t key = 0; key < keys; ++key) total += scores[h][key] * widen(latents[key][c]);
      sums[h][c] = total;
    }
  }
}

template <class Stored>
void attend_as(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token,
               int64_t head) {
  const int64_t full = layer.rank + layer.rope, left = layer.heads - head, seen = sequence.start + token + 1;
  const int64_t heads = left < kHeadsTogether ? left : kHeadsTogether;
  const int64_t first_query = (sequence.first + token) * layer.heads + head;
  const float* query[kHeadsTogether];
  for (int64_t h = 0; h < kHeadsTogether; ++h) {  // what is missing repeats the last, and is thrown away
    query[h] = call.absorbed + (first_query + (h < heads ? h : heads - 1)) * full;
  }
  alignas(64) float sums[kHeadsTogether][kMaxRank] = {};
  float top[kHeadsTogether], total[kHeadsTogether] = {}, fade[kHeadsTogether];
  for (float& value : top) value = -INFINITY;

  for (int64_t first = 0; first < seen; first += kPage) {
    const int64_t keys = seen - first < kPage ? seen - first : kPage;
    const Stored* latents[kPage];
    for (int64_t key = 0; key < kPage; ++key) {
      latents[key] = key < keys ? cached_row<Stored>(layer, sequence, first + key) : latents[keys - 1];
    }
    alignas(64) float scores[kHeadsTogether][kPage];
    const int64_t even = (keys + 1) / 2 * 2;
    for (int64_t key = 0; key < even; key += 2) {
      float pair[kHeadsTogether][kPage];
      score<kHeadsTogether, 2>(query, latents + key, full, layer.scale, pair);
      for (int h = 0; h < kHeadsTogether; ++h) memcpy(scores[h] + key, pair[h], 2 * sizeof(float));
    }
    for (int h = 0; h < kHeadsTogether; ++h) {
      float highest = top[h];
      for (int64_t key = 0; key < keys; ++key) highest = scores[h][key] > highest ? scores[h][key] : highest;
      for (int64_t key = keys; key < kPage; ++key) scores[h][key] = -INFINITY;
      fade[h] = expf(top[h] - highest);
      top[h] = highest;
      V added = {};
      for (int64_t key = 0; key < kPage; key += kWidth) {
        const V weight = exponential(load(scores[h] + key) - highest);
        store(scores[h] + key, weight);
        added += weight;
      }
      for (int64_t key = keys; key < kPage; ++key) added[key % kWidth] -= scores[h][key];
      total[h] = total[h] * fade[h] + sum(added);
    }
    weigh(sums, fade, scores, latents, keys, layer.rank);
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* to = call.absorbed + (first_query + h) * full;
    for (int64_t i = 0; i < layer.rank; ++i) to[i] = sums[h][i] / total[h];
  }
}

// Four heads of one token attend; what they sum takes the place of their absorbed queries.
void attend(const MoehiveMla& layer, const MoehiveMlaCall& call, const MoehiveSequence& sequence, int64_t token,
            int64_t head) {
  return layer.half ? attend_as<uint16_t>(layer, call, sequence, token, head)
                    : attend_as<float>(layer, call, sequence, token, head);
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
    for (int64_t t = 0; t < tokens; t += kHeadsTogether) {
      const int64_t here = tokens - t < kHeadsTogether ? tokens - t : kHeadsTogether;
      const float* query[kHeadsTogether];
      float products[kHeadsTogether][kPage];
      for (int64_t i = 0; i < kHeadsTogether; ++i) query[i] = latent(t + (i < here ? i : here - 1));
      if (tokens == 1) {
        score<1, 8>(query, from, rank, 1.0f, products);
      } else {
        score<kHeadsTogether, 2>(query, from, rank, 1.0f, products);
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
