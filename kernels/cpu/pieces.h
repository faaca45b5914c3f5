// How many rows of a matrix a thread takes at once.
//
// With several tokens a piece stays in the second cache while groups of them pass over it. With one it is read once, as
// long streams (block-inl.h), but small enough that the threads end together. Pieces are multiples of 16 rows, so no two
// threads share a line.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace moehive {

constexpr int64_t kPieceRows = 64;  // at most, with several tokens

inline int64_t piece_rows(Format format, int64_t columns) {
  const int64_t rows = (64 << 10) / rows_bytes(format, kGroupRows, columns) * kGroupRows;
  return std::clamp(rows, kGroupRows, kPieceRows);
}

// With one token, of `all` rows that `threads` share.
inline int64_t piece_rows_for_one(Format format, int64_t columns, int64_t all, int threads) {
  const int64_t most = (256 << 10) / rows_bytes(format, kGroupRows, columns) * kGroupRows;
  const int64_t rows = std::min(most, all / (8 * threads));
  return rows >= 64 ? rows / 64 * 64 : std::max(kGroupRows, rows / kGroupRows * kGroupRows);
}

}  // namespace moehive
