// Fields of proto/experts.proto's messages as protobuf writes them: varints, and arrays of 4 bytes a number.
#ifndef MOEHIVE_DISPATCH_FIELDS_H_
#define MOEHIVE_DISPATCH_FIELDS_H_

#include <cstdint>
#include <cstring>

namespace moehive {

enum RequestField : uint8_t {  // ComputeRequest's
  kRequestId = 1, kEpoch, kStep, kLayer, kTokens, kHiddenSize, kDtype, kReduction, kHiddenStates, kOffsets, kExperts,
  kWeights
};

constexpr uint32_t kPerExpert = 2;       // REDUCTION_PER_EXPERT
constexpr uint64_t kF32 = 1, kBf16 = 2;  // DTYPE_F32 and DTYPE_BF16

// What a field begins with: a number, or a length and so many bytes.
constexpr uint8_t number_tag(uint8_t field) { return static_cast<uint8_t>(field << 3); }
constexpr uint8_t bytes_tag(uint8_t field) { return static_cast<uint8_t>(field << 3 | 2); }

inline uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<uint8_t>(value) | 0x80;
  *to++ = static_cast<uint8_t>(value);
  return to;
}

// Whether a whole one stood there; then `at` is behind it.
inline bool get_varint(const uint8_t*& at, const uint8_t* end, uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 64 && at < end; shift += 7) {
    const uint8_t byte = *at++;
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

inline uint8_t* put_number(uint8_t* to, uint8_t field, uint64_t value) {
  *to++ = number_tag(field);
  return put_varint(to, value);
}

inline uint8_t* put_array(uint8_t* to, uint8_t field, const void* numbers, int64_t count) {
  *to++ = bytes_tag(field);
  to = put_varint(to, 4 * static_cast<uint64_t>(count));
  std::memcpy(to, numbers, 4 * count);
  return to + 4 * count;
}

}  // namespace moehive

#endif
