// The trunk's arithmetic, written once with vectors of the compiler and compiled for each instruction set.
//
// The including file defines kWidth, the floats of a register. As in multiply-inl.h nothing here has external
// linkage, nor uses the standard library's templates. Multiplications and additions are fused where the processor can.
#pragma once

#include <math.h>

#include "trunk.h"
#include "vec-inl.h"

namespace moehive {
namespace {

constexpr int kTile = 4;  // query rows at once: kTile * 2 sums in registers
constexpr float kNone = -1e30f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t padded_head(int64_t n) { return (n + 15) / 16 * 16; }

inline void put(float* at, float x) { *at = x; }
inline void put(uint16_t* at, float x) { *at = to_bf16(x); }

inline float squares(const float* x, int64_t n) {
  V sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int k = 0; k < 2; ++k) {
      const V v = load(x + i + k * kWidth);
      sums[k] += v * v;
    }
  float total = sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

inline float inverse_rms(const float* x, int64_t n, float eps) {
  return 1.0f / sqrtf(squares(x, n) / static_cast<float>(n) + eps);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

void add_norm(const AddNorm& p, int64_t token) {
  const int64_t n = p.width;
  float* hidden = p.hidden + token * n;
  if (p.add && p.add_half) {
    const uint16_t* add = static_cast<const uint16_t*>(p.add) + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += from_bf16(add[i]);
  } else if (p.add) {
    const float* add = static_cast<const float*>(p.add) + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += add[i];
  }
  if (p.more) {
    const float factor = p.gate ? sigmoid(p.gate[token * p.gate_stride]) : 1.0f;
    const float* more = p.more + token * n;
    for (int64_t i = 0; i < n; ++i) hidden[i] += more[i] * factor;
  }
  if (!p.norm) return;
  const float factor = inverse_rms(hidden, n, p.eps);
  float* out = p.out + token * n;
  for (int64_t i = 0; i < n; ++i) out[i] = hidden[i] * factor * p.norm[i];
  if (p.half_out)
    for (int64_t i = 0; i < n; ++i) p.half_out[token * n + i] = to_bf16(out[i]);
}

// Norm and rotation of one head, in place.
inline void turn(const MoehiveAttention& a, float* x, const float* norm, const float* cos, const float* sin) {
  if (norm) {
    const float factor = inverse_rms(x, a.head_dim, a.eps);
    for (int64_t i = 0; i < a.head_dim; ++i) x[i] = x[i] * factor * norm[i];
  }
  const int64_t half = a.rotary / 2;
  if (a.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float even = x[2 * i], odd = x[2 * i + 1];
      x[2 * i] = even * cos[i] - odd * sin[i];
      x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

template <class Stored>
inline Stored* keys_of(const MoehiveAttention& a, uint64_t page, int64_t head) {
  return reinterpret_cast<Stored*>(page + a.page_keys) + head * a.head_dim * kPage;
}
template <class Stored>
inline Stored* values_of(const MoehiveAttention& a, uint64_t page, int64_t head) {
  return reinterpret_cast<Stored*>(page + a.page_values) + head * kPage * padded_head(a.head_dim);
}

template <class Stored>
void append(const MoehiveAttention& a, const float* row, uint64_t page, int64_t slot) {
  const int64_t width = padded_head(a.head_dim);
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    const float* key = row + a.keys_at + head * a.head_dim;
    const float* value = row + a.values_at + head * a.head_dim;
    Stored* keys = keys_of<Stored>(a, page, head) + slot;
    Stored* values = values_of<Stored>(a, page, head) + slot * width;
    for (int64_t i = 0; i < a.head_dim; ++i) put(keys + i * kPage, key[i]);
    for (int64_t i = 0; i < a.head_dim; ++i) put(values + i, value[i]);
    for (int64_t i = a.head_dim; i < width; ++i) put(values + i, 0.0f);
  }
}

// Norms and turns a token's queries and key, and writes key and value to its page.
void prepare(const Attend& p, const MoehiveSequence& sequence, int64_t token) {
  const MoehiveAttention& a = p.layer;
  const int64_t at = sequence.first + token, position = sequence.start + token, half = a.rotary / 2;
  float* row = p.rows + at * a.row;
  const float *cos = p.cos + at * half, *sin = p.sin + at * half;
  for (int64_t head = 0; head < a.heads; ++head) turn(a, row + head * a.query_stride, a.query_norm, cos, sin);
  for (int64_t head = 0; head < a.kv_heads; ++head)
    turn(a, row + a.keys_at + head * a.head_dim, a.key_norm, cos, sin);
  const uint64_t page = sequence.pages[position / kPage];
  if (a.half) {
    append<uint16_t>(a, row, page, position % kPage);
  } else {
    append<float>(a, row, page, position % kPage);
  }
}

// scores[r][t] = queries[r] . keys[.][t] for R rows and a page's tokens.
template <int R, class Stored>
inline void score(const float* queries, int64_t stride, const Stored* keys, int64_t n, float (*scores)[kPage]) {
  for (int64_t t = 0; t < kPage; t += 2 * kWidth) {
    V sums[R][2] = {};
    for (int64_t i = 0; i < n; ++i) {
      const V left = load(keys + i * kPage + t), right = load(keys + i * kPage + t + kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V q = same(queries[r * stride + i]);
        sums[r][0] += q * left;
        sums[r][1] += q * right;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(&scores[r][t], sums[r][0]);
      store(&scores[r][t + kWidth], sums[r][1]);
    }
  }
}

// sums[r] += sum over t of chances[r][t] * values[t - low], for R rows and the tokens low .. high of a page.
template <int R, class Stored>
inline void gather(const float (*chances)[kPage], int64_t low, int64_t high, const Stored* values, int64_t width,
                   float* sums, int64_t stride) {
  constexpr int kParts = 16 / kWidth < 2 ? 1 : 2;  // `width` is a multiple of 16
  for (int64_t i = 0; i < width; i += kParts * kWidth) {
    V total[R][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) total[r][k] = load(sums + r * stride + i + k * kWidth);
    for (int64_t t = low; t < high; ++t) {
      V value[kParts];
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) value[k] = load(values + (t - low) * width + i + k * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V chance = same(chances[r][t]);
#pragma GCC unroll 2
        for (int k = 0; k < kParts; ++k) total[r][k] += chance * value[k];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) store(sums + r * stride + i + k * kWidth, total[r][k]);
  }
}

// Calls work(rows as a constant, first row) for tiles of at most kTile rows.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <class Work>
inline void for_tiles(int64_t rows, Work&& work) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) work(Rows<kTile>{}, r);
  switch (rows - r) {
    case 3: return work(Rows<3>{}, r);
    case 2: return work(Rows<2>{}, r);
    case 1: return work(Rows<1>{}, r);
    default: return;
  }
}

// One row's scores of a page to their share of a softmax that goes on: tokens low .. high count.
inline void soften(float* scores, int64_t low, int64_t high, float& top, float& total, float* sums, int64_t width) {
  for (int64_t t = 0; t < low; ++t) scores[t] = kNone;
  for (int64_t t = high; t < kPage; ++t) scores[t] = kNone;
  if (low >= high) {
    for (int64_t t = 0; t < kPage; ++t) scores[t] = 0.0f;
    return;
  }
  V best = load(scores);
  for (int64_t t = kWidth; t < kPage; t += kWidth) {
    const V v = load(scores + t);
    best = v > best ? v : best;
  }
  float highest = top;
  for (int i = 0; i < kWidth; ++i) highest = best[i] > highest ? best[i] : highest;
  if (highest > top) {
    const float shrink = expf(top - highest);
    total *= shrink;
    for (int64_t i = 0; i < width; i += kWidth) store(sums + i, load(sums + i) * shrink);
    top = highest;
  }
  V share{};
  for (int64_t t = 0; t < kPage; t += kWidth) {
    const V chance = exponential(load(scores + t) - highest);
    store(scores + t, chance);
    share += chance;
  }
  total += sum(share);
}

// A page's numbers as floats, where several tiles of rows read them.
inline const float* widened(const float* at, int64_t, float*) { return at; }
inline const float* widened(const uint16_t* at, int64_t n, float* wide) {
  for (int64_t i = 0; i < n; i += kWidth) store(wide + i, load(at + i));
  return wide;
}

template <class Stored>
void attend_as(const Attend& p, const AttendPart& part) {
  const MoehiveAttention& a = p.layer;
  const MoehiveSequence& sequence = *part.sequence;
  const int64_t rows = part.tokens * part.heads, n = a.head_dim, width = padded_head(n);
  const int64_t kv_head = part.head / (a.heads / a.kv_heads);
  const int64_t stride = width + 16;  // a power of two would put all rows into a few lines of the first cache
  alignas(64) float queries[kMaxQueries * (kMaxHead + 16)], sums[kMaxQueries * (kMaxHead + 16)];
  alignas(64) float scores[kMaxQueries][kPage], page_numbers[kMaxHead * kPage];
  float top[kMaxQueries], total[kMaxQueries];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = part.token + r / part.heads, head = part.head + r % part.heads;
    const float* query = p.rows + (sequence.first + token) * a.row + head * a.query_stride;
    for (int64_t i = 0; i < n; ++i) queries[r * stride + i] = query[i] * a.scale;
    for (int64_t i = 0; i < width; ++i) sums[r * stride + i] = 0.0f;
    top[r] = a.sinks ? a.sinks[head] : kNone;
    total[r] = a.sinks ? 1.0f : 0.0f;
  }
  const int64_t begin = sequence.start + part.token, end = begin + part.tokens;
  const int64_t first = a.window ? most(0, begin - a.window + 1) : 0;
  for (int64_t page = first / kPage; page * kPage < end; ++page) {
    const int64_t base = page * kPage;
    const Stored* keys = keys_of<Stored>(a, sequence.pages[page], kv_head);
    const Stored* values = values_of<Stored>(a, sequence.pages[page], kv_head);
    if (rows > kTile) {
      const float* wide = widened(keys, n * kPage, page_numbers);
      for_tiles(rows, [&](auto tile, int64_t r) {
        score<decltype(tile)::value>(queries + r * stride, stride, wide, n, scores + r);
      });
    } else {
      for_tiles(rows, [&](auto tile, int64_t r) {
        score<decltype(tile)::value>(queries + r * stride, stride, keys, n, scores + r);
      });
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = begin + r / part.heads;
      const int64_t low = a.window ? most(0, position - a.window + 1 - base) : 0;
      const int64_t high = most(0, least(kPage, position + 1 - base));
      soften(scores[r], least(low, kPage), high, top[r], total[r], sums + r * stride, width);
    }
    const int64_t low = most(0, first - base), high = least(kPage, end - base);
    if (rows > kTile) {
      const float* wide = widened(values + low * width, (high - low) * width, page_numbers);
      for_tiles(rows, [&](auto tile, int64_t r) {
        gather<decltype(tile)::value>(scores + r, low, high, wide, width, sums + r * stride, stride);
      });
    } else {
      for_tiles(rows, [&](auto tile, int64_t r) {
        gather<decltype(tile)::value>(scores + r, low, high, values + low * width, width, sums + r * stride, stride);
      });
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = sequence.first + part.token + r / part.heads, head = part.head + r % part.heads;
    float* out = p.out + (token * a.heads + head) * n;
    const float factor = 1.0f / total[r];
    if (a.gate_at < 0) {
      for (int64_t i = 0; i < n; ++i) out[i] = sums[r * stride + i] * factor;
    } else {
      const float* gate = p.rows + token * a.row + head * a.query_stride + a.gate_at;
      for (int64_t i = 0; i < n; ++i) out[i] = sums[r * stride + i] * factor * sigmoid(gate[i]);
    }
  }
}

void attend(const Attend& p, const AttendPart& part) {
  if (p.layer.half) {
    attend_as<uint16_t>(p, part);
  } else {
    attend_as<float>(p, part);
  }
}

inline float activated(float x, int32_t activation) {
  switch (activation) {
    case 1: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case 3: return x > 0.0f ? x : 0.0f;
    case 4: return x > 0.0f ? x * x : 0.0f;
    default: return x * sigmoid(x);
  }
}

void gate(const float* in, int64_t middle, int32_t activation, float* out) {
  int64_t i = 0;
  if (activation == 0) {
    for (; i + kWidth <= middle; i += kWidth) store(out + i, silu(load(in + i)) * load(in + middle + i));
  }
  for (; i < middle; ++i) out[i] = activated(in[i], activation) * in[middle + i];
}

// The largest of `values` that is not `taken` before place `used`; the first among equals.
inline int64_t largest(const float* values, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (values[i] > values[best]) best = i;
  return best;
}

inline float top_two(const float* values, int64_t n) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return first + second;
}

// `scratch` [2 * experts + groups]
void route(const MoehiveRouter& p, const float* logits, float* scratch, int64_t* ids, float* weights) {
  float *scores = scratch, *choice = scratch + p.experts, *groups = choice + p.experts;
  if (p.scores == 0) {
    const float top = logits[largest(logits, p.experts)];
    float total = 0.0f;
    for (int64_t e = 0; e < p.experts; ++e) total += scores[e] = expf(logits[e] - top);
    for (int64_t e = 0; e < p.experts; ++e) scores[e] /= total;
  } else {
    for (int64_t e = 0; e < p.experts; ++e) scores[e] = p.scores == 1 ? sigmoid(logits[e]) : logits[e];
  }
  for (int64_t e = 0; e < p.experts; ++e) choice[e] = scores[e] + (p.bias ? p.bias[e] : 0.0f);
  if (p.groups > 1) {
    const int64_t size = p.experts / p.groups;
    for (int64_t g = 0; g < p.groups; ++g) groups[g] = top_two(choice + g * size, size);
    for (int64_t i = 0; i < p.top_groups; ++i) groups[largest(groups, p.groups)] = -INFINITY;
    for (int64_t g = 0; g < p.groups; ++g)
      if (groups[g] != -INFINITY)
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = -INFINITY;
  }
  float total = 0.0f;
  for (int64_t i = 0; i < p.top_k; ++i) {
    ids[i] = largest(choice, p.experts);
    choice[ids[i]] = -INFINITY;
    weights[i] = scores[ids[i]];
    if (p.scores == 2) weights[i] = expf(weights[i] - scores[ids[0]]);
    total += weights[i];
  }
  const float sum = p.scores == 1 ? total + 1e-20f : total;
  const float factor = p.renormalize || p.scores == 2 ? p.scaling / sum : p.scaling;
  for (int64_t i = 0; i < p.top_k; ++i) weights[i] *= factor;
}

}  // namespace
}  // namespace moehive
