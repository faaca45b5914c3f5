// A matrix in a block format, its rounding errors answered by the columns that are still to come.
//
// GPTQ (Frantar et al., 2022, arXiv:2210.17323): columns are rounded in order, and each one's error is compensated in
// those after it, as far as what they are multiplied with goes together. Scales of a block are fitted when its turn
// comes, to the numbers as they are by then (fit-inl.h). Rows do not depend on each other: sixteen are worked on at
// once, a row in a lane, so that nothing is summed across lanes and results are the same on every processor.
#pragma once

#include <cstdint>

#include "grids.h"

// As Python hands it over (kernels/native.py has the same fields in the same order). A width is `columns` up to whole
// blocks; what pads counts as zeros.
struct MoehiveRounding {
  const float* weight;      // [rows][columns]
  const float* importance;  // [width] how much a square of a column's error counts, above 0; null: all the same
  const float* factor;      // [width][stride] upper Cholesky factor of the inverse of the second moments; null: errors
                            // are not compensated
  uint8_t* codes;           // [rows][width]
  uint16_t* d;              // [rows][blocks] f16: the unit of the scales
  uint16_t* m;              // [rows][blocks] f16: that of the minimums, for formats which have them
  int8_t* scales;           // [rows][sub-blocks]
  uint8_t* minimums;        // [rows][sub-blocks], for formats which have them
  int64_t rows, columns, stride;
  int32_t format;
};

namespace moehive {

constexpr int64_t kRoundedRows = 16;  // together

inline int64_t rounded_width(const MoehiveRounding& job) {
  const int64_t columns = grid_of(static_cast<Format>(job.format)).columns;
  return (job.columns + columns - 1) / columns * columns;
}

// What one instruction set contributes.
struct RoundingKernel {
  // The rows `first` to `first` + kRoundedRows - 1; `left` [width][kRoundedRows] floats to work in, aligned to 64 bytes.
  void (*round)(const MoehiveRounding& job, int64_t first, float* left);
};

extern const RoundingKernel kRoundingPlain;
#if defined(__x86_64__) || defined(_M_X64)
extern const RoundingKernel kRoundingAvx2;
#endif

}  // namespace moehive

// Rounds all rows on up to `threads` threads. Returns 0; 1 if an argument can't be; 2 without memory.
extern "C" __attribute__((visibility("default"))) int32_t moehive_quantize(const MoehiveRounding* job,
                                                                           int32_t threads);
