// Attention over a paged KV cache, written once with vectors of the compiler and compiled for each instruction set.
//
// A cache in bf16 holds pairs (attention.h): of keys two numbers of a head, of values two tokens, so that a register has
// both of many lanes. Where the processor multiplies pairs of bf16 (vdpbf16ps), queries and weights are rounded to bf16,
// as the keys and values are; elsewhere they stay f32.
//
// The softmax goes over a page at a time, as FlashAttention's (Dao et al., 2022), and starts anew with each span of
// kSpan pages; spans are joined in order. So a row's bits do not depend on how spans were given to threads.
#pragma once

#include <math.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "attention.h"
#include "fetch-inl.h"
#include "norm-inl.h"

namespace moehive {
namespace {

// Query rows at once, with two sums for each in registers.
constexpr int kTile = kWidth == 16 ? 8 : 4;
constexpr float kNone = -1e30f;
constexpr int64_t kMaxQuery = kMaxRank + kMaxRope;
static_assert(kMaxHead <= kMaxQuery, "a query of either kind has room");

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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

// A key head's part of a page: its keys. Its values follow, head_dim * kPage numbers on.
template <class Stored>
inline Stored* keys_of(const MoehiveAttention& a, uint64_t page, int64_t head) {
  return reinterpret_cast<Stored*>(page + a.page_at) + head * (a.head_dim + padded_head(a.head_dim)) * kPage;
}

inline void append(const float* key, const float* value, int64_t n, float* keys, int64_t slot, bool) {
  for (int64_t i = 0; i < n; ++i) keys[i * kPage + slot] = key[i];
  float* values = keys + n * kPage;
  for (int64_t first = 0, wide; first < padded_head(n); first += wide) {
    wide = least(kValueBlock, padded_head(n) - first);
    float* to = values + first * kPage + slot * wide;
    for (int64_t i = 0; i < wide; ++i) to[i] = first + i < n ? value[first + i] : 0.0f;
  }
}

inline void append(const float* key, const float* value, int64_t n, uint16_t* keys, int64_t slot, bool last) {
  for (int64_t i = 0; i < n; ++i) keys[(i / 2 * kPage + slot) * 2 + i % 2] = to_bf16(key[i]);
  uint16_t* values = keys + n * kPage;
  const int64_t odd = slot % 2;
  for (int64_t first = 0, wide; first < padded_head(n); first += wide) {
    wide = least(kValueBlock, padded_head(n) - first);
    uint16_t* to = values + first * kPage + (slot - odd) * wide + odd;
    for (int64_t i = 0; i < wide; ++i) to[2 * i] = first + i < n ? to_bf16(value[first + i]) : 0;
    if (last && !odd)  // the token after it is multiplied by zero until it comes, and must not be what no number is
      for (int64_t i = 0; i < wide; ++i) to[2 * i + 1] = 0;
  }
}

template <class Stored>
void append_as(const MoehiveAttention& a, const float* row, uint64_t page, int64_t slot, bool last) {
  for (int64_t head = 0; head < a.kv_heads; ++head)
    append(row + a.keys_at + head * a.head_dim, row + a.values_at + head * a.head_dim, a.head_dim,
           keys_of<Stored>(a, page, head), slot, last);
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
  const bool last = token + 1 == sequence.tokens;
  if (a.half) {
    append_as<uint16_t>(a, row, page, position % kPage, last);
  } else {
    append_as<float>(a, row, page, position % kPage, last);
  }
}

// What a cache of `Stored` numbers is multiplied with: numbers of type Factor, as `factors` makes them of floats.
//
// `add` adds a register's worth of products to `sum`: of `kStep` neighbours in a row of factors with as many in each
// lane of the cache, which begin at `at`.
template <class Stored>
struct Cached;

template <>
struct Cached<float> {
  static constexpr int kStep = 1;
  using Factor = float;
  using Lanes = V;
  static inline void factors(const float* from, int64_t n, Factor* to) { memcpy(to, from, n * sizeof *to); }
  static inline Lanes lanes(const float* at) { return load(at); }
  static inline V add(V sum, Lanes lanes, const Factor* factor) { return sum + same(*factor) * lanes; }
};

template <>
struct Cached<uint16_t> {
  static constexpr int kStep = 2;
#if defined(__AVX512BF16__)
  using Factor = uint16_t;
  using Lanes = __m512bh;
  // n is a multiple of 16.
  static inline void factors(const float* from, int64_t n, Factor* to) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      memcpy(to + i, &rounded, sizeof rounded);
    }
  }
  static inline Lanes lanes(const uint16_t* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static inline V add(V sum, Lanes lanes, const Factor* factor) {
    int32_t pair;
    memcpy(&pair, factor, sizeof pair);
    return (V)_mm512_dpbf16_ps((__m512)sum, lanes, (__m512bh)_mm512_set1_epi32(pair));
  }
#else
  using Factor = float;
  struct Lanes {
    V even, odd;
  };
  static inline void factors(const float* from, int64_t n, Factor* to) { memcpy(to, from, n * sizeof *to); }
  static inline Lanes lanes(const uint16_t* at) {
    U both;
    memcpy(&both, at, sizeof both);
    return {(V)(both << 16), (V)(both & 0xffff0000u)};
  }
  static inline V add(V sum, const Lanes& lanes, const Factor* factor) {
    return sum + same(factor[0]) * lanes.even + same(factor[1]) * lanes.odd;
  }
#endif
};

// What lies 6 KiB on, most often of the next head: with so much arithmetic between two loads a processor by itself does
// not look far enough. Zen 4, one thread and two, 8,000 tokens, 32 query heads on 4 of 128 numbers: 1,550 and 880 us without, 1,460 and 790
// into the first cache, 1,020 and 560 so.
inline void fetch_ahead(const void* at) {
  const char* next = static_cast<const char*>(at) + (6 << 10);
  fetch_to_second_cache(next);
  fetch_to_second_cache(next + 64);
}

// scores[r][t] = queries[r] . keys[.][t] for R rows and a page's tokens.
template <int R, class Stored>
inline void score(const typename Cached<Stored>::Factor* queries, int64_t stride, const Stored* keys, int64_t n,
                  float (*scores)[kPage]) {
  using Cache = Cached<Stored>;
  for (int64_t t = 0; t < kPage; t += 2 * kWidth) {
    V sums[R][2] = {};
    for (int64_t i = 0; i < n; i += Cache::kStep) {
      const Stored* at = keys + i * kPage + t * Cache::kStep;
      fetch_ahead(at);
      const auto left = Cache::lanes(at), right = Cache::lanes(at + kWidth * Cache::kStep);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][0] = Cache::add(sums[r][0], left, queries + r * stride + i);
        sums[r][1] = Cache::add(sums[r][1], right, queries + r * stride + i);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(&scores[r][t], sums[r][0]);
      store(&scores[r][t + kWidth], sums[r][1]);
    }
  }
}

// kParts registers of each of R rows' sums: += sum over t of weights[r * kPage + t] * values[t], t from low to high.
template <int R, int kParts, class Stored>
inline void gather_parts(const typename Cached<Stored>::Factor* weights, int64_t low, int64_t high,
                         const Stored* values, int64_t wide, float* sums, int64_t stride) {
  using Cache = Cached<Stored>;
  V total[R][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int k = 0; k < kParts; ++k) total[r][k] = load(sums + r * stride + k * kWidth);
  for (int64_t t = low; t < high; t += Cache::kStep) {
    typename Cache::Lanes value[kParts];
    fetch_ahead(values + t * wide);
#pragma GCC unroll 2
    for (int k = 0; k < kParts; ++k) value[k] = Cache::lanes(values + t * wide + k * kWidth * Cache::kStep);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int k = 0; k < kParts; ++k) total[r][k] = Cache::add(total[r][k], value[k], weights + r * kPage + t);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int k = 0; k < kParts; ++k) store(sums + r * stride + k * kWidth, total[r][k]);
}

// sums[r] += sum over t of weights[r * kPage + t] * values[t], for R rows and the tokens low .. high of a page.
template <int R, class Stored>
inline void gather(const typename Cached<Stored>::Factor* weights, int64_t low, int64_t high, const Stored* values,
                   int64_t width, float* sums, int64_t stride) {
  constexpr int kStep = Cached<Stored>::kStep;
  for (int64_t first = 0, wide; first < width; first += wide) {
    wide = least(kValueBlock, width - first);
    const Stored* block = values + first * kPage;
    int64_t i = 0;
    for (; i + 2 * kWidth <= wide; i += 2 * kWidth)
      gather_parts<R, 2>(weights, low, high, block + i * kStep, wide, sums + first + i, stride);
    for (; i < wide; i += kWidth)
      gather_parts<R, 1>(weights, low, high, block + i * kStep, wide, sums + first + i, stride);
  }
}

// Calls work(rows as a constant, first row) for tiles of at most kTile rows.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <int R, class Work>
inline void for_tiles(int64_t first, int64_t rows, Work&& work) {
  for (; first + R <= rows; first += R) work(Rows<R>{}, first);
  if constexpr (R > 1) for_tiles<(R > 4 ? 4 : R - 1)>(first, rows, work);
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
  const float highest = largest(best);
  if (highest > top) {
    const float shrink = expf(top - highest);
    total *= shrink;
    for (int64_t i = 0; i < width; i += kWidth) store(sums + i, load(sums + i) * shrink);
    top = highest;
  }
  V share{};
  for (int64_t t = 0; t < kPage; t += kWidth) {
    const V weight = exponential(load(scores + t) - top);
    store(scores + t, weight);
    share += weight;
  }
  total += sum(share);
}

inline void begin(const Seen& seen, int64_t rows) {
  for (int64_t i = 0; i < rows * seen.stride; ++i) seen.sums[i] = 0.0f;
  for (int64_t r = 0; r < rows; ++r) seen.top[r] = kNone;
  for (int64_t r = 0; r < rows; ++r) seen.total[r] = 0.0f;
}

// A row's query of n numbers times `scale`, as factors.
template <class Stored>
inline void take_query(const Seen& seen, int64_t row, const float* query, int64_t n, float scale) {
  using Factor = typename Cached<Stored>::Factor;
  alignas(64) float scaled[Seen::stride_of(kMaxQuery)];
  for (int64_t i = 0; i < seen.query_stride; ++i) scaled[i] = i < n ? query[i] * scale : 0.0f;
  Cached<Stored>::factors(scaled, seen.query_stride, reinterpret_cast<Factor*>(seen.queries) + row * seen.query_stride);
}

// Rows first .. first + rows, at most kMaxQueries, over a page: keys [n][kPage], values of `width` numbers in blocks.
// bounds(r, low, high) says which tokens row r sees, all of them from `low` to `high`.
template <class Stored, class Bounds>
inline void attend_page(const Seen& seen, int64_t first, int64_t rows, const Stored* keys, int64_t n,
                        const Stored* values, int64_t width, int64_t low, int64_t high, Bounds&& bounds) {
  using Cache = Cached<Stored>;
  using Factor = typename Cache::Factor;
  alignas(64) float scores[kMaxQueries][kPage];
  alignas(64) Factor weights[kMaxQueries * kPage];
  const Factor* queries = reinterpret_cast<const Factor*>(seen.queries) + first * seen.query_stride;
  float* sums = seen.sums + first * seen.stride;
  for_tiles<kTile>(0, rows, [&](auto tile, int64_t r) {
    score<decltype(tile)::value>(queries + r * seen.query_stride, seen.query_stride, keys, n, scores + r);
  });
  for (int64_t r = 0; r < rows; ++r) {
    int64_t from, to;
    bounds(first + r, from, to);
    soften(scores[r], from, to, seen.top[first + r], seen.total[first + r], sums + r * seen.stride, width);
  }
  Cache::factors(scores[0], rows * kPage, weights);
  low = low / Cache::kStep * Cache::kStep;
  for_tiles<kTile>(0, rows, [&](auto tile, int64_t r) {
    gather<decltype(tile)::value>(weights + r * kPage, low, high, values, width, sums + r * seen.stride, seen.stride);
  });
}

inline const float* query_of(const Attend& p, const AttendPart& part, int64_t row, int64_t& token, int64_t& head) {
  const MoehiveAttention& a = p.layer;
  const int64_t each = part.tokens * part.heads, kv_head = part.kv_head + row / each;
  token = part.sequence->first + part.token + row % each / part.heads;
  head = kv_head * (a.heads / a.kv_heads) + part.head + row % part.heads;
  return p.rows + token * a.row + head * a.query_stride;
}

template <class Stored>
void attend_as(const Attend& p, const AttendPart& part, int64_t span, const Seen& seen) {
  const MoehiveAttention& a = p.layer;
  const uint64_t* pages = part.sequence->pages;
  const int64_t rows = part.tokens * part.heads, n = a.head_dim;
  begin(seen, part.rows());
  for (int64_t r = 0, token, head; r < part.rows(); ++r)
    take_query<Stored>(seen, r, query_of(p, part, r, token, head), n, a.scale);
  const int64_t position = part.position(), end = position + part.tokens;
  const int64_t first = a.window ? most(0, position - a.window + 1) : 0;
  const int64_t last = least((span + 1) * kSpan, (end - 1) / kPage + 1);
  for (int64_t page = most(span * kSpan, first / kPage); page < last; ++page) {
    const int64_t base = page * kPage;
    for (int64_t head = 0; head < part.kv_heads; ++head) {
      const Stored* keys = keys_of<Stored>(a, pages[page], part.kv_head + head);
      attend_page(seen, head * rows, rows, keys, n, keys + n * kPage, padded_head(n), most(0, first - base),
                  least(kPage, end - base), [&](int64_t r, int64_t& low, int64_t& high) {
                    const int64_t at = position + r % rows / part.heads;
                    low = a.window ? least(kPage, most(0, at - a.window + 1 - base)) : 0;
                    high = most(0, least(kPage, at + 1 - base));
                  });
    }
  }
}

void attend(const Attend& p, const AttendPart& part, int64_t span, const Seen& seen) {
  if (p.layer.half) {
    attend_as<uint16_t>(p, part, span, seen);
  } else {
    attend_as<float>(p, part, span, seen);
  }
}

void join(int64_t rows, const Seen& seen, const Seen& more) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = seen.top[r] > more.top[r] ? seen.top[r] : more.top[r];
    const float mine = expf(seen.top[r] - top), its = expf(more.top[r] - top);
    float* sums = seen.sums + r * seen.stride;
    const float* added = more.sums + r * seen.stride;
    for (int64_t i = 0; i < seen.stride; i += kWidth) store(sums + i, load(sums + i) * mine + load(added + i) * its);
    seen.total[r] = seen.total[r] * mine + more.total[r] * its;
    seen.top[r] = top;
  }
}

void finish(const Attend& p, const AttendPart& part, const Seen& seen) {
  const MoehiveAttention& a = p.layer;
  for (int64_t r = 0, token, head; r < part.rows(); ++r) {
    const float *query = query_of(p, part, r, token, head), *sums = seen.sums + r * seen.stride;
    const float sink = a.sinks ? a.sinks[head] : kNone, top = seen.top[r] > sink ? seen.top[r] : sink;
    const float mine = expf(seen.top[r] - top);
    const float factor = mine / (seen.total[r] * mine + (a.sinks ? expf(sink - top) : 0.0f));
    float* out = p.out + (token * a.heads + head) * a.head_dim;
    if (a.gate_at < 0) {
      for (int64_t i = 0; i < a.head_dim; ++i) out[i] = sums[i] * factor;
    } else {
      const float* gate = query + a.gate_at;
      for (int64_t i = 0; i < a.head_dim; ++i) out[i] = sums[i] * factor * sigmoid(gate[i]);
    }
  }
}

}  // namespace
}  // namespace moehive
