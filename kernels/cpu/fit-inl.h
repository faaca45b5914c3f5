// Fits the scales of a block of eight rows, a row in a lane.
//
// Which column matters how much is a weight of its own, as in llama.cpp's importance matrix: the mean square of what the
// column is multiplied with. The scale of a sub-block is searched: some roundings are tried, each with the scale that
// fits it best by weighted least squares, and the best one counts.
#pragma once

#include "f16.h"
#include "rounding.h"
#include "vec8-inl.h"

namespace moehive {
namespace {

constexpr int kTries = 6;  // roundings that are tried for a sub-block's scale, to each side of the plain one
constexpr float kTiny = 1e-30f;
constexpr float kLeastF16 = 0x1p-24f;  // above 0

inline V larger(V a, V b) { return a > b ? a : b; }
inline V size_of(V v) { return (V)((I)v & 0x7fffffff); }
inline V inverse_of(V v) { return v == 0.0f ? V{} : 1.0f / v; }

// The nearest whole number from `low` to `high`, which are at most 2^21 in size; ties go to the even one.
inline V whole(V v, float low, float high) {
  v = v >= low ? v : same(low);  // in this order what is no number becomes one
  v = v <= high ? v : same(high);
  return (v + 12582912.0f) - 12582912.0f;
}

// What the searches need of a sub-block: its numbers, and how much their errors count.
template <int kSub>
struct Weighted {
  V x[kSub], w[kSub], wx[kSub];

  // `x` [kSub][kRoundedRows]. Large numbers count more than small ones beside them, as in llama.cpp: an error of theirs
  // is felt elsewhere.
  Weighted(const float* numbers, const float* importance) {
    V squares = {};
    for (int i = 0; i < kSub; ++i) {
      x[i] = load(numbers + i * kRoundedRows);
      squares += x[i] * x[i];
    }
    squares /= static_cast<float>(kSub);
    for (int i = 0; i < kSub; ++i) {
      V size = squares + x[i] * x[i];
      for (int lane = 0; lane < kWidth; ++lane) size[lane] = __builtin_sqrtf(size[lane]);
      w[i] = larger(size, same(kTiny)) * (importance ? importance[i] : 1.0f);
      wx[i] = w[i] * x[i];
    }
  }
};

// A code, and what it stands for before it is scaled.
struct Code {
  V code, number;
};

// That of `number` by its scale's inverse.
template <Format kFormat>
inline Code nearest(V number, V inverse) {
  constexpr Grid grid = grid_of(kFormat);
  if constexpr (grid.table) {
    const V scaled = number * inverse;
    I code = {};
    V value = same(kIq4[0]);
    for (int i = 1; i < kIq4Codes; ++i) {
      const I above = scaled > (kIq4[i] + kIq4[i - 1]) / 2;
      code -= above;
      value += (V)(above & (I)same(kIq4[i] - kIq4[i - 1]));
    }
    return {__builtin_convertvector(code, V), value};
  } else {
    const V code = whole(number * inverse + static_cast<float>(grid.offset), 0, grid.levels - 1);
    return {code, code - static_cast<float>(grid.offset)};
  }
}

// The best scale of a sub-block, of either sign.
template <Format kFormat>
inline V search_scale(const Weighted<grid_of(kFormat).sub>& of) {
  constexpr Grid grid = grid_of(kFormat);
  // The code that reaches furthest: a symmetric grid has one code more below 0 than above.
  constexpr double far = grid.table ? kIq4[0] : -grid.offset, step = grid.table ? -far / 80 : 0.1;
  V most = of.x[0];
  for (int i = 1; i < grid.sub; ++i) most = size_of(of.x[i]) > size_of(most) ? of.x[i] : most;
  V best_gain = same(-1.0f), best = {};
  for (int number = -kTries; number <= kTries; ++number) {
    const V inverse = inverse_of(most / static_cast<float>(far + step * number));
    V cross = {}, square = {};
    for (int i = 0; i < grid.sub; ++i) {
      const V value = nearest<kFormat>(of.x[i], inverse).number;
      cross += of.wx[i] * value;
      square += of.w[i] * value * value;
    }
    square = larger(square, same(kTiny));
    const V gain = cross * cross / square;
    best = gain > best_gain ? cross / square : best;
    best_gain = larger(gain, best_gain);
  }
  return best;
}

// For number = scale * code - minimum: both >= 0.
template <Format kFormat>
inline void search_both(const Weighted<grid_of(kFormat).sub>& of, V& best_scale, V& best_minimum) {
  constexpr Grid grid = grid_of(kFormat);
  constexpr float top = grid.levels - 1;
  V low = {}, high = {}, sum_w = {}, sum_x = {};
  for (int i = 0; i < grid.sub; ++i) {
    low = of.x[i] < low ? of.x[i] : low;
    high = larger(of.x[i], high);
    sum_w += of.w[i];
    sum_x += of.wx[i];
  }
  V best_error = same(__builtin_inff());
  best_scale = best_minimum = V{};
  for (int number = -kTries; number <= kTries; ++number) {
    const double wider = 0.1 * number * (top < 7 ? top / 7.0 : 1.0);
    const V inverse = inverse_of((high - low) / static_cast<float>(top + wider));
    V code[grid.sub], sum_c = {}, sum_cc = {}, sum_xc = {};
    for (int i = 0; i < grid.sub; ++i) {
      code[i] = whole((of.x[i] - low) * inverse, 0, top);
      const V weighted = of.w[i] * code[i];
      sum_c += weighted;
      sum_cc += weighted * code[i];
      sum_xc += of.wx[i] * code[i];
    }
    const V determinant = sum_w * sum_cc - sum_c * sum_c;
    const V safe = determinant > 0.0f ? determinant : same(1.0f);
    V scale = (sum_w * sum_xc - sum_x * sum_c) / safe;
    V minimum = -(sum_cc * sum_x - sum_c * sum_xc) / safe;
    // One code for all, or a minimum that can't be stored: a scale without one; all codes 0: the mean alone.
    const I alone = (determinant <= 0.0f) | (minimum < 0.0f);
    scale = larger(alone ? sum_xc / larger(sum_cc, same(kTiny)) : scale, V{});
    minimum = larger(alone ? (sum_cc == 0.0f ? -sum_x / sum_w : V{}) : minimum, V{});
    V error = {};
    for (int i = 0; i < grid.sub; ++i) {
      const V off = scale * code[i] - minimum - of.x[i];
      error += of.w[i] * (off * off);
    }
    const I better = error < best_error;
    best_error = better ? error : best_error;
    best_scale = better ? scale : best_scale;
    best_minimum = better ? minimum : best_minimum;
  }
}

// Factors of one block of eight rows; `scale` and `minimum` are what a reader multiplies.
template <Format kFormat>
struct Fit {
  static constexpr int kSubs = grid_of(kFormat).columns / grid_of(kFormat).sub;
  uint16_t d[kWidth], m[kWidth];
  V scales[kSubs], minimums[kSubs];  // whole numbers, without d and m
  V scale[kSubs], minimum[kSubs];
};

// Rounds to f16.
inline V halves(V v, uint16_t* to) {
  for (int lane = 0; lane < kWidth; ++lane) {
    to[lane] = to_f16(v[lane]);
    v[lane] = from_f16(to[lane]);
  }
  return v;
}

// `x` [columns of a block][kRoundedRows], of which eight lanes are read; `importance` [columns of a block] or null.
template <Format kFormat>
inline void fit_block(const float* x, const float* importance, Fit<kFormat>& fit) {
  constexpr Grid grid = grid_of(kFormat);
  constexpr int subs = Fit<kFormat>::kSubs;
  V scale[subs], minimum[subs];
  for (int s = 0; s < subs; ++s) {
    const int first = s * grid.sub;
    const Weighted<grid.sub> of(x + first * kRoundedRows, importance ? importance + first : nullptr);
    if constexpr (grid.most_minimum > 0)
      search_both<kFormat>(of, scale[s], minimum[s]);
    else
      scale[s] = search_scale<kFormat>(of);
  }
  V most = scale[0];
  for (int s = 1; s < subs; ++s) most = size_of(scale[s]) > size_of(most) ? scale[s] : most;
  // Where scales have a sign, the integer of the largest one is `low`, which reaches one further than `high`.
  const V wanted = most / static_cast<float>(grid.most_minimum > 0 ? grid.high : grid.low);
  V d = halves(wanted, fit.d);
  if constexpr (grid.low < 0) {
    const V least = (V)(((I)wanted & INT32_MIN) | (I)same(kLeastF16));
    d = halves((d == 0.0f) & (most != 0.0f) ? least : d, fit.d);
  }
  const V inverse = inverse_of(d);
  for (int s = 0; s < subs; ++s) {
    fit.scales[s] = grid.low == grid.high ? same(1.0f) : whole(scale[s] * inverse, grid.low, grid.high);
    fit.scale[s] = d * fit.scales[s];
  }
  if constexpr (grid.most_minimum > 0) {
    V largest = minimum[0];
    for (int s = 1; s < subs; ++s) largest = larger(minimum[s], largest);
    const V m = halves(largest / static_cast<float>(grid.most_minimum), fit.m), by = inverse_of(m);
    for (int s = 0; s < subs; ++s) {
      fit.minimums[s] = whole(minimum[s] * by, 0, grid.most_minimum);
      fit.minimum[s] = m * fit.minimums[s];
    }
  }
}

}  // namespace
}  // namespace moehive
