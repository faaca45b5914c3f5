#include "sums.h"

#include <cmath>
#include <cstring>

#include "bf16.h"

namespace moehive {

void sum_pairs(const float* rows, int64_t number, int64_t stride, int64_t columns, float* sum) {
  std::memset(sum, 0, columns * sizeof(float));
  for (int64_t row = 0; row < number; ++row)
    for (int64_t i = 0; i < columns; ++i) sum[i] += rows[row * stride + i];
}

void sum_pairs(const float* pairs, const uint32_t* offsets, int64_t tokens, int64_t hidden_size, float* sums) {
  for (int64_t t = 0; t < tokens; ++t)
    sum_pairs(pairs + offsets[t] * hidden_size, offsets[t + 1] - offsets[t], hidden_size, hidden_size,
              sums + t * hidden_size);
}

namespace {

constexpr int64_t kAtOnce = 256;  // sums that stay in the first cache while the parts pass over them

// `n` numbers of a row, f32 or bf16 of any alignment, into `to`.
template <bool kBf16>
void load(const void* from, int64_t at, int64_t n, float* to) {
  if constexpr (kBf16) {
    uint16_t half[kAtOnce];
    std::memcpy(half, static_cast<const char*>(from) + at * 2, n * 2);
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
  } else {
    std::memcpy(to, static_cast<const char*>(from) + at * 4, n * 4);
  }
}

// One piece of sums, and the sum of their squares. Called with a constant `n` it becomes vectors.
template <bool kBf16>
inline float add_piece(const void* const* parts, int64_t number, int64_t at, int64_t n, void* out) {
  float sums[kAtOnce] = {}, part[kAtOnce];
  if (number > 0) load<kBf16>(parts[0], at, n, sums);  // not added to 0: 0 + -0 would be another 0
  for (int64_t p = 1; p < number; ++p) {
    load<kBf16>(parts[p], at, n, part);
    for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
  }
  float lanes[8] = {};
  for (int64_t i = 0; i + 8 <= n; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += sums[i + lane] * sums[i + lane];
  float squares = 0.0f;
  for (int64_t i = n / 8 * 8; i < n; ++i) squares += sums[i] * sums[i];
  for (float lane : lanes) squares += lane;
  if constexpr (kBf16) {
    uint16_t half[kAtOnce];
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(sums[i]);
    std::memcpy(static_cast<char*>(out) + at * 2, half, n * 2);
  } else {
    std::memcpy(static_cast<char*>(out) + at * 4, sums, n * 4);
  }
  return squares;
}

template <bool kBf16>
bool add_all(const void* const* parts, int64_t number, int64_t count, void* out) {
  float squares = 0.0f;
  int64_t at = 0;
  for (; at + kAtOnce <= count; at += kAtOnce) squares += add_piece<kBf16>(parts, number, at, kAtOnce, out);
  if (at < count) squares += add_piece<kBf16>(parts, number, at, count - at, out);
  return std::isfinite(squares);
}

}  // namespace

bool add_rows(const void* const* parts, int64_t number, bool bf16, int64_t count, void* out) {
  return bf16 ? add_all<true>(parts, number, count, out) : add_all<false>(parts, number, count, out);
}

}  // namespace moehive
