// A layer's routing split by node, and as the fields of proto/experts.proto's ComputeRequest.
#ifndef MOEHIVE_DISPATCH_SPLIT_H_
#define MOEHIVE_DISPATCH_SPLIT_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../../kernels/cpu/fields.h"

namespace moehive {

// One node's share of a layer.
struct ShareHead {
  int64_t node, pairs, rows;
  int64_t bytes;  // of its routing's fields
};

// Where the arrays of a split lie, see moehive_split in dispatch.cc; n = tokens * k.
struct Block {
  int64_t *pairs, *rows;
  ShareHead* heads;
  uint32_t* experts;
  float* weights;
  uint32_t* offsets;

  // Numbers of 8 bytes that one has at most.
  static int64_t size(int64_t n, int64_t experts) { return 5 * n + 8 * std::min(n, experts) + 1; }

  Block(int64_t* block, int64_t n, int64_t most_experts)
      : pairs(block), rows(pairs + n), heads(reinterpret_cast<ShareHead*>(rows + n)),
        experts(reinterpret_cast<uint32_t*>(heads + std::min(n, most_experts))),
        weights(reinterpret_cast<float*>(experts + n)),
        offsets(experts + 2 * n) {}

  // The routing's fields of so many nodes, behind their offsets.
  uint8_t* fields(int64_t shares) const {
    int64_t numbers = shares;
    for (int64_t share = 0; share < shares; ++share) numbers += heads[share].rows;
    return reinterpret_cast<uint8_t*>(offsets + numbers);
  }
};

class Split {
 public:
  // See moehive_split in dispatch.cc.
  int64_t run(const int64_t* ids, const float* weights, int64_t tokens, int64_t k, const int64_t* owner,
              int64_t experts, const Block& block) {
    const Routing routing{ids, weights, tokens, k, owner, experts};
    count(routing);
    const int64_t shares = lay_out(block);
    fill(routing, block);
    write_fields(block, shares);
    return shares;
  }

 private:
  struct Routing {
    const int64_t* ids;
    const float* weights;
    int64_t tokens, k;
    const int64_t* owner;
    int64_t experts;

    // Calls `each(part, token, pair)` for every pair that somebody computes, in ascending order.
    template <typename Each>
    void for_pairs(const Each& each) const {
      for (int64_t token = 0, pair = 0; token < tokens; ++token) {
        for (int64_t at = 0; at < k; ++at, ++pair) {
          const int64_t expert = ids[pair];
          if (expert >= 0 && expert < experts) each(std::max<int64_t>(owner[expert], -1) + 1, token, pair);
        }
      }
    }
  };

  struct Part {  // one node's share while it is put together
    int64_t pairs, rows;
    int64_t pair, row, offset;  // where its next ones go
    int64_t first;              // its first pair
    int64_t token;              // its last one
  };

  // How many pairs and tokens each node has.
  void count(const Routing& routing) {
    parts_.clear();
    routing.for_pairs([this](int64_t number, int64_t token, int64_t) {
      if (number >= static_cast<int64_t>(parts_.size())) parts_.resize(number + 1, Part{0, 0, 0, 0, 0, 0, -1});
      Part& part = parts_[number];
      ++part.pairs;
      if (part.token != token) ++part.rows, part.token = token;
    });
  }

  // Where each node's pairs and tokens go; returns the number of nodes that have some.
  int64_t lay_out(const Block& block) {
    int64_t shares = 0, pair = 0, row = 0;
    for (size_t number = 0; number < parts_.size(); ++number) {
      Part& part = parts_[number];
      if (part.pairs == 0) continue;
      part.pair = part.first = pair, part.row = row, part.offset = row + shares, part.token = -1;
      pair += part.pairs, row += part.rows;
      block.offsets[row + shares] = static_cast<uint32_t>(part.pairs);
      block.heads[shares++] = {static_cast<int64_t>(number) - 1, part.pairs, part.rows, 0};
    }
    return shares;
  }

  void fill(const Routing& routing, const Block& block) {
    // Copies of both, for the compiler must take it that what is written here changes the originals.
    routing.for_pairs([this, routing, block](int64_t number, int64_t token, int64_t pair) {
      Part& part = parts_[number];
      if (part.token != token) {
        part.token = token;
        block.rows[part.row++] = token;
        block.offsets[part.offset++] = static_cast<uint32_t>(part.pair - part.first);
      }
      block.pairs[part.pair] = pair;
      block.experts[part.pair] = static_cast<uint32_t>(routing.ids[pair]);
      block.weights[part.pair++] = routing.weights[pair];
    });
  }

  static void write_fields(const Block& block, int64_t shares) {
    uint8_t* to = block.fields(shares);
    for (int64_t share = 0, pair = 0, offset = 0; share < shares; ++share) {
      ShareHead& head = block.heads[share];
      uint8_t* const start = to;
      to = put_bytes(to, request_field::kOffsets, block.offsets + offset, 4 * (head.rows + 1));
      to = put_bytes(to, request_field::kExperts, block.experts + pair, 4 * head.pairs);
      to = put_bytes(to, request_field::kWeights, block.weights + pair, 4 * head.pairs);
      head.bytes = to - start;
      pair += head.pairs, offset += head.rows + 1;
    }
  }

  std::vector<Part> parts_;
};

}  // namespace moehive

#endif
