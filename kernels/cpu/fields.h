// The hop's messages as protobuf writes them, for those that are read and written natively: the numbers of
// proto/experts.proto, varints, and fields. Nodes (answer.cc) and the dispatcher share them.
#pragma once

#include <cstdint>
#include <cstring>

namespace moehive {

// Of ComputeRequest and of ComputeReply.
namespace request_field {
enum : uint8_t {
  kId = 1, kEpoch, kStep, kLayer, kTokens, kHiddenSize, kDtype, kReduction, kHiddenStates, kOffsets, kExperts, kWeights
};
}
namespace reply_field {
enum : uint8_t { kId = 1, kComputeNs, kRows, kValues, kBeganNs = 9, kReadingNs, kWaitedNs, kWroteNs };
}

constexpr uint32_t kF32 = 1, kBf16 = 2;              // Dtype
constexpr uint32_t kPartialSum = 1, kPerExpert = 2;  // Reduction

// What a field begins with: of a number, and of bytes, whose length follows.
constexpr uint8_t number_tag(uint8_t field) { return static_cast<uint8_t>(field << 3); }
constexpr uint8_t bytes_tag(uint8_t field) { return static_cast<uint8_t>(field << 3 | 2); }

// Whether a whole varint stood there; then `at` is behind it.
inline bool get_varint(const uint8_t*& at, const uint8_t* end, uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 64 && at < end; shift += 7) {
    const uint8_t byte = *at++;
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// All that follow return where the next field goes.
inline uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<uint8_t>(value) | 0x80;
  *to++ = static_cast<uint8_t>(value);
  return to;
}

inline uint8_t* put_number(uint8_t* to, uint8_t field, uint64_t value) {
  *to++ = number_tag(field);
  return put_varint(to, value);
}

// Without the bytes themselves.
inline uint8_t* put_length(uint8_t* to, uint8_t field, uint64_t bytes) {
  *to++ = bytes_tag(field);
  return put_varint(to, bytes);
}

inline uint8_t* put_bytes(uint8_t* to, uint8_t field, const void* bytes, uint64_t size) {
  to = put_length(to, field, size);
  if (size) std::memcpy(to, bytes, size);
  return to + size;
}

}  // namespace moehive
