// The pairs of a layer by expert, and the pieces of a projection of all its experts that threads take one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "expert_mlp.h"
#include "pieces.h"

namespace moehive {

constexpr int64_t kMaxTokens = 96;                         // of a group within a piece
constexpr int64_t kMaxProducts = kPieceRows * kMaxTokens;  // of a group's, and rows of a piece with one token

struct Pair {
  uint64_t blob;
  uint32_t pair, token;
};

// Pairs first .. last of the sorted list are one expert's.
struct Group {
  const char* blob;
  int64_t first, last;
};

// The pairs of experts that are here, sorted by those.
inline std::vector<Pair> pairs_of(const Layer& layer) {
  std::vector<Pair> pairs;
  for (int64_t token = 0; token < layer.tokens; ++token)
    for (uint32_t pair = layer.offsets[token]; pair < layer.offsets[token + 1]; ++pair)
      if (layer.blobs[pair] != 0) pairs.push_back({layer.blobs[pair], pair, static_cast<uint32_t>(token)});
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    return a.blob != b.blob ? a.blob < b.blob : a.pair < b.pair;
  });
  return pairs;
}

inline std::vector<Group> groups_of(const std::vector<Pair>& pairs) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < static_cast<int64_t>(pairs.size()); ++i) {
    if (i == 0 || pairs[i].blob != pairs[i - 1].blob)
      groups.push_back({reinterpret_cast<const char*>(pairs[i].blob), i, i});
    groups.back().last = i + 1;
  }
  return groups;
}

struct Pieces {
  int64_t step, end;  // rows of a piece, of an expert
  int64_t of_expert;  // pieces

  // `threads` share one token of each expert; 0: there are several.
  Pieces(Format format, int64_t columns, int64_t rows, int64_t experts, int threads)
      : step(threads ? std::min(piece_rows_for_one(format, columns, rows * experts, threads), kMaxProducts)
                     : piece_rows(format, columns)),
        end(rows),
        of_expert((rows + step - 1) / step) {}

  int64_t expert(int64_t piece) const { return piece / of_expert; }
  int64_t first_row(int64_t piece) const { return piece % of_expert * step; }

  // Walks one piece: its rows, and its expert's tokens in groups of at most kMaxTokens.
  template <class Work>
  void walk(const std::vector<Group>& groups, int64_t piece, Work&& work) const {
    const Group& group = groups[expert(piece)];
    const int64_t row = first_row(piece);
    for (int64_t first = group.first; first < group.last; first += kMaxTokens)
      work(group.blob, row, std::min(step, end - row), first, std::min(kMaxTokens, group.last - first));
  }
};

}  // namespace moehive
