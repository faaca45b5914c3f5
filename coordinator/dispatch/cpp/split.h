// A layer's routing split by node, and as the fields of proto/experts.proto's ComputeRequest.
#ifndef MOEHIVE_DISPATCH_SPLIT_H_
#define MOEHIVE_DISPATCH_SPLIT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace moehive {

// proto/experts.proto's numbers of ComputeRequest's fields.
enum RequestField : uint8_t {
  kRequestId = 1, kEpoch, kStep, kLayer, kTokens, kHiddenSize, kDtype, kReduction, kHiddenStates, kOffsets, kExperts,
  kWeights
};

inline uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<uint8_t>(value) | 0x80;
  *to++ = static_cast<uint8_t>(value);
  return to;
}

// A field that holds an array of 4 bytes a number.
inline uint8_t* put_array(uint8_t* to, uint8_t field, const void* numbers, int64_t count) {
  *to++ = static_cast<uint8_t>(field << 3 | 2);
  to = put_varint(to, 4 * static_cast<uint64_t>(count));
  std::memcpy(to, numbers, 4 * count);
  return to + 4 * count;
}

// One node's share of a layer, as `Split` writes it to its block.
struct ShareHead {
  int64_t node, pairs, rows;
  int64_t bytes;  // of its routing's fields
};

class Split {
 public:
  // Numbers of 8 bytes that a block has at most.
  static int64_t block_size(int64_t n, int64_t experts) { return 5 * n + 8 * std::min(n, experts) + 1; }

  // See moehive_split in dispatch.cc.
  int64_t run(const int64_t* ids, const float* weights, int64_t tokens, int64_t k, const int64_t* owner,
              int64_t experts, int64_t* block) {
    const int64_t n = tokens * k;
    int64_t *const pairs = block, *const rows = pairs + n;
    ShareHead* const shares = reinterpret_cast<ShareHead*>(rows + n);
    uint32_t* const numbers = reinterpret_cast<uint32_t*>(shares + std::min(n, experts));
    float* const factors = reinterpret_cast<float*>(numbers + n);
    uint32_t* const offsets = numbers + 2 * n;
    parts_.clear();
    for (int64_t token = 0, pair = 0; token < tokens; ++token) {
      for (int64_t at = 0; at < k; ++at, ++pair) {
        const int64_t node = node_of(ids[pair], owner, experts);
        if (node == kNone) continue;
        if (node >= static_cast<int64_t>(parts_.size())) parts_.resize(node + 1, Part{0, 0, 0, 0, 0, 0, -1});
        Part& part = parts_[node];
        ++part.pairs;
        if (part.token != token) ++part.rows, part.token = token;
      }
    }
    int64_t count = 0, pair_at = 0, row_at = 0;
    for (size_t node = 0; node < parts_.size(); ++node) {
      Part& part = parts_[node];
      if (part.pairs == 0) continue;
      part.pair = part.first = pair_at, part.row = row_at, part.offset = row_at + count, part.token = -1;
      pair_at += part.pairs, row_at += part.rows;
      offsets[row_at + count] = static_cast<uint32_t>(part.pairs);
      shares[count++] = {static_cast<int64_t>(node) - 1, part.pairs, part.rows, 0};
    }
    for (int64_t token = 0, pair = 0; token < tokens; ++token) {
      for (int64_t at = 0; at < k; ++at, ++pair) {
        const int64_t node = node_of(ids[pair], owner, experts);
        if (node == kNone) continue;
        Part& part = parts_[node];
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
      ShareHead& head = shares[share];
      uint8_t* const start = to;
      to = put_array(to, kOffsets, offsets + offset, head.rows + 1);
      to = put_array(to, kExperts, numbers + pair, head.pairs);
      to = put_array(to, kWeights, factors + pair, head.pairs);
      head.bytes = to - start;
      pair += head.pairs, offset += head.rows + 1;
    }
    return count;
  }

 private:
  struct Part {  // one node's share while it is put together
    int64_t pairs, rows;
    int64_t pair, row, offset;  // where its next ones go
    int64_t first;              // its first pair
    int64_t token;              // its last one
  };

  static constexpr int64_t kNone = -1;

  static int64_t node_of(int64_t expert, const int64_t* owner, int64_t experts) {
    return expert >= 0 && expert < experts ? std::max<int64_t>(owner[expert], -1) + 1 : kNone;
  }

  std::vector<Part> parts_;
};

}  // namespace moehive

#endif
