// The arithmetic of rounding.h, compiled for each instruction set by the including file.
#pragma once

#include "fit-inl.h"

namespace moehive {
namespace {

constexpr int kTogether = 32;  // columns whose errors are kept in the first cache before all later ones answer them
constexpr int kHalves = kRoundedRows / kWidth;

typedef uint8_t B __attribute__((vector_size(kWidth)));

// left[c] -= factor[k][c] * errors[k] for kTogether columns k from `from` on and all columns c after them, one k after
// the other. `left` and `errors` have kRoundedRows floats a column. Not inlined: what the caller keeps in registers would
// push numbers out of them.
__attribute__((noinline)) void answer(float* left, const float* errors, const float* factor, int64_t stride,
                                      int64_t from, int64_t width) {
  constexpr int columns = 8 / kHalves;  // whose numbers stay in registers
  constexpr int line = 16;    // a multiple of it; of the factor, whose rows may all fall into the same few cache lines
  alignas(64) float panel[kTogether * line];
  for (int64_t first = from + kTogether; first < width; first += line) {
    for (int k = 0; k < kTogether; ++k)
      memcpy(panel + k * line, factor + (from + k) * stride + first, line * sizeof(float));
    for (int c = 0; c < line; c += columns) {
      float* to = left + (first + c) * kRoundedRows;
      V numbers[columns][kHalves];
      for (int j = 0; j < columns; ++j)
        for (int h = 0; h < kHalves; ++h) numbers[j][h] = load(to + j * kRoundedRows + h * kWidth);
      for (int k = 0; k < kTogether; ++k) {
        V error[kHalves];
        for (int h = 0; h < kHalves; ++h) error[h] = load(errors + k * kRoundedRows + h * kWidth);
        for (int j = 0; j < columns; ++j)
          for (int h = 0; h < kHalves; ++h) numbers[j][h] -= error[h] * panel[k * line + c + j];
      }
      for (int j = 0; j < columns; ++j)
        for (int h = 0; h < kHalves; ++h) store(to + j * kRoundedRows + h * kWidth, numbers[j][h]);
    }
  }
}

template <Format kFormat>
inline void put_factors(const MoehiveRounding& job, const Fit<kFormat>& fit, int64_t block, int64_t blocks,
                        int64_t first, int64_t rows) {
  constexpr int subs = Fit<kFormat>::kSubs;
  for (int64_t lane = 0; lane < rows; ++lane) {
    const int64_t at = (first + lane) * blocks + block;
    job.d[at] = fit.d[lane];
    for (int s = 0; s < subs; ++s) job.scales[at * subs + s] = static_cast<int8_t>(fit.scales[s][lane]);
    if constexpr (grid_of(kFormat).most_minimum > 0) {
      job.m[at] = fit.m[lane];
      for (int s = 0; s < subs; ++s) job.minimums[at * subs + s] = static_cast<uint8_t>(fit.minimums[s][lane]);
    }
  }
}

// Codes of `kTogether` columns from `start` on, and each column's error by its own factor.
template <Format kFormat>
inline void round_columns(const MoehiveRounding& job, const Fit<kFormat>* fits, int64_t block_start, int64_t start,
                          float* left, uint8_t* codes, float* errors) {
  constexpr Grid grid = grid_of(kFormat);
  for (int i = 0; i < kTogether; ++i) {
    const int64_t column = start + i, sub = (column - block_start) / grid.sub;
    const float* own = job.factor ? job.factor + column * job.stride : nullptr;
    for (int h = 0; h < kHalves; ++h) {
      const V number = load(left + column * kRoundedRows + h * kWidth), scale = fits[h].scale[sub];
      V least = {};
      if constexpr (grid.most_minimum > 0) least = fits[h].minimum[sub];
      const Code code = nearest<kFormat>(number + least, inverse_of(scale));
      const B bytes = __builtin_convertvector(__builtin_convertvector(code.code, I), B);
      memcpy(codes + (column - block_start) * kRoundedRows + h * kWidth, &bytes, sizeof bytes);
      if (!own) continue;
      const V error = (number - (code.number * scale - least)) / own[column];
      store(errors + i * kRoundedRows + h * kWidth, error);
      for (int j = i + 1; j < kTogether; ++j) {
        float* later = left + (start + j) * kRoundedRows + h * kWidth;
        store(later, load(later) - error * own[start + j]);
      }
    }
  }
}

template <Format kFormat>
void round_rows(const MoehiveRounding& job, int64_t first, float* left) {
  constexpr Grid grid = grid_of(kFormat);
  const int64_t width = rounded_width(job), blocks = width / grid.columns;
  const int64_t rows = job.rows - first < kRoundedRows ? job.rows - first : kRoundedRows;
  memset(left, 0, width * kRoundedRows * sizeof(float));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < job.columns; ++column)
      left[column * kRoundedRows + row] = job.weight[(first + row) * job.columns + column];

  Fit<kFormat> fits[kHalves];
  uint8_t codes[grid.columns * kRoundedRows];
  alignas(64) float errors[kTogether * kRoundedRows];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * grid.columns;
    for (int h = 0; h < kHalves; ++h) {
      fit_block<kFormat>(left + start * kRoundedRows + h * kWidth, job.importance ? job.importance + start : nullptr,
                         fits[h]);
      const int64_t here = rows - h * kWidth;
      put_factors<kFormat>(job, fits[h], block, blocks, first + h * kWidth, here < kWidth ? here : kWidth);
    }
    for (int64_t column = start; column < start + grid.columns; column += kTogether) {
      round_columns<kFormat>(job, fits, start, column, left, codes, errors);
      if (job.factor) answer(left, errors, job.factor, job.stride, column, width);
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < grid.columns; ++i)
        job.codes[(first + row) * width + start + i] = codes[i * kRoundedRows + row];
  }
}

void round_any(const MoehiveRounding& job, int64_t first, float* left) {
  switch (static_cast<Format>(job.format)) {
    case Format::q2_k: return round_rows<Format::q2_k>(job, first, left);
    case Format::q3_k: return round_rows<Format::q3_k>(job, first, left);
    case Format::iq4_xs: return round_rows<Format::iq4_xs>(job, first, left);
    case Format::q4_k: return round_rows<Format::q4_k>(job, first, left);
    case Format::q5_k: return round_rows<Format::q5_k>(job, first, left);
    case Format::q6_k: return round_rows<Format::q6_k>(job, first, left);
    case Format::q8_0: return round_rows<Format::q8_0>(job, first, left);
    case Format::iq4_nl: return round_rows<Format::iq4_nl>(job, first, left);
    default: return;
  }
}

}  // namespace
}  // namespace moehive
