// The message that asks a node for its share of a layer of few tokens: proto/experts.proto's ComputeRequest.
#ifndef MOEHIVE_DISPATCH_REQUEST_H_
#define MOEHIVE_DISPATCH_REQUEST_H_

#include <cstdint>
#include <cstring>

#include "../../../kernels/cpu/fields.h"
#include "way.h"

namespace moehive {

constexpr int64_t kFrameHead = 14;  // room before a message for its head, proto/wire/windows.py's HEAD_BYTES

// What the requests of one layer have in common.
struct Request {
  static constexpr int64_t kRoom = 128;  // more than a message's head and its fields but its arrays take

  const Way& way;
  uint64_t step;
  const uint8_t* hidden;  // [tokens, hidden] f32 or bf16
  int64_t tokens;
  bool bf16;

  int64_t row_bytes() const { return way.hidden_size * (bf16 ? 2 : 4); }

  // Writes the message of a node that computes `rows` tokens, `token` of all; `routing`: its last fields, written.
  // Returns its end.
  uint8_t* write(uint8_t* to, uint64_t id, const int64_t* token, int64_t rows, const uint8_t* routing,
                 int64_t routing_bytes) const {
    using namespace request_field;
    const int64_t width = row_bytes();
    to = put_number(to, kEpoch, way.epoch);
    to = put_number(to, kStep, step);
    to = put_number(to, kLayer, way.layer);
    to = put_number(to, kTokens, rows);
    to = put_number(to, kHiddenSize, way.hidden_size);
    to = put_number(to, kDtype, bf16 ? kBf16 : kF32);
    to = put_number(to, kReduction, way.reduction);
    to = put_number(to, kId, id);
    to = put_length(to, kHiddenStates, rows * width);
    if (rows == tokens) {
      std::memcpy(to, hidden, rows * width);
    } else {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * width, hidden + token[i] * width, width);
    }
    to += rows * width;
    std::memcpy(to, routing, routing_bytes);
    return to + routing_bytes;
  }
};

}  // namespace moehive

#endif
