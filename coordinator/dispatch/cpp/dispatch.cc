// What the dispatcher does for each layer of a step: coordinator/dispatch/native.py calls these, on one thread at a
// time for each loop. Scratch memory is kept for the next layer.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "choice.h"

namespace {

struct Part {  // one node's share while it is put together
  int64_t pairs, rows;
  int64_t pair, row, offset;  // where its next ones go
  int64_t first;              // its first pair
  int64_t token;              // its last one
};

constexpr int64_t kNone = -1;
constexpr uint8_t kOffsets = 10, kExperts = 11, kWeights = 12;  // ComputeRequest's fields

uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<uint8_t>(value) | 0x80;
  *to++ = static_cast<uint8_t>(value);
  return to;
}

// A field of proto/experts.proto that holds an array of 4 bytes a number.
uint8_t* put_array(uint8_t* to, uint8_t field, const void* numbers, int64_t count) {
  *to++ = static_cast<uint8_t>(field << 3 | 2);
  to = put_varint(to, 4 * static_cast<uint64_t>(count));
  std::memcpy(to, numbers, 4 * count);
  return to + 4 * count;
}

int64_t node_of(int64_t expert, const int64_t* owner, int64_t experts) {
  return expert >= 0 && expert < experts ? std::max<int64_t>(owner[expert], -1) + 1 : kNone;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t moehive_dispatch_abi() { return 2; }

// See Choice; `owner` [experts] also gets the first holder of each expert that `ids` does not name. 0, or 1: no memory.
EXPORT int32_t moehive_choose(const int32_t* holders, int64_t experts, int64_t most, const double* base,
                              const double* per, int64_t nodes, const int64_t* ids, int64_t pairs, int32_t by_pairs,
                              int64_t* owner) {
  try {
    thread_local moehive::Choice choice;
    for (int64_t expert = 0; expert < experts; ++expert) owner[expert] = holders[expert * most];
    choice.start(holders, experts, most, base, per, nodes);
    choice.run(ids, pairs, by_pairs != 0, owner);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Splits `ids` and `weights` [tokens, k] by `owner` [experts], a node or -1 for each; ids outside the experts are left
// out. Nodes, and a node's pairs, come in ascending order. `block` gets, one after the other, with n = tokens * k:
//   int64 [n]                  where each pair stands
//   int64 [n]                  the tokens of each node
//   int64 [min(n, experts), 4] each node, its pairs, its tokens, its bytes of the last array
//   uint32 [n]                 the pairs' experts
//   float [n]                  their weights
//   uint32 [n + nodes]         for each node where its tokens' pairs begin and end, one more than it has tokens
//   bytes                      the same three of each node as a ComputeRequest says them; 12 n + 24 nodes at most
// The number of nodes, or -1: no memory.
EXPORT int64_t moehive_split(const int64_t* ids, const float* weights, int64_t tokens, int64_t k, const int64_t* owner,
                             int64_t experts, int64_t* block) {
  const int64_t n = tokens * k;
  int64_t *const pairs = block, *const rows = pairs + n, *const shares = rows + n;
  uint32_t* const numbers = reinterpret_cast<uint32_t*>(shares + 4 * std::min(n, experts));
  float* const factors = reinterpret_cast<float*>(numbers + n);
  uint32_t* const offsets = numbers + 2 * n;
  try {
    thread_local std::vector<Part> parts;
    parts.clear();
    for (int64_t token = 0, pair = 0; token < tokens; ++token) {
      for (int64_t at = 0; at < k; ++at, ++pair) {
        const int64_t node = node_of(ids[pair], owner, experts);
        if (node == kNone) continue;
        if (node >= static_cast<int64_t>(parts.size())) parts.resize(node + 1, Part{0, 0, 0, 0, 0, 0, -1});
        Part& part = parts[node];
        ++part.pairs;
        if (part.token != token) ++part.rows, part.token = token;
      }
    }
    int64_t count = 0, pair_at = 0, row_at = 0;
    for (size_t node = 0; node < parts.size(); ++node) {
      Part& part = parts[node];
      if (part.pairs == 0) continue;
      part.pair = part.first = pair_at, part.row = row_at, part.offset = row_at + count, part.token = -1;
      pair_at += part.pairs, row_at += part.rows;
      offsets[row_at + count] = static_cast<uint32_t>(part.pairs);
      shares[4 * count] = static_cast<int64_t>(node) - 1;
      shares[4 * count + 1] = part.pairs, shares[4 * count + 2] = part.rows;
      ++count;
    }
    for (int64_t token = 0, pair = 0; token < tokens; ++token) {
      for (int64_t at = 0; at < k; ++at, ++pair) {
        const int64_t node = node_of(ids[pair], owner, experts);
        if (node == kNone) continue;
        Part& part = parts[node];
        if (part.token != token) {
          part.token = token;
          rows[part.row++] = token;
          offsets[part.offset++] = static_cast<uint32_t>(part.pair - part.first);
        }
        pairs[part.pair] = pair;
        numbers[part.pair] = static_cast<uint32_t>(ids[pair]);
        factors[part.pair++] = weights[pair];
      }
    }
    uint8_t* to = reinterpret_cast<uint8_t*>(offsets + row_at + count);
    for (int64_t share = 0, pair = 0, offset = 0; share < count; ++share) {
      int64_t* const figures = shares + 4 * share;
      uint8_t* const start = to;
      to = put_array(to, kOffsets, offsets + offset, figures[2] + 1);
      to = put_array(to, kExperts, numbers + pair, figures[1]);
      to = put_array(to, kWeights, factors + pair, figures[1]);
      figures[3] = to - start;
      pair += figures[1], offset += figures[2] + 1;
    }
    return count;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
