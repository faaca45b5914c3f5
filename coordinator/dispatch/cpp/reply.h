// A node's plain answer: proto/experts.proto's ComputeReply with rows and times, and nothing else.
#ifndef MOEHIVE_DISPATCH_REPLY_H_
#define MOEHIVE_DISPATCH_REPLY_H_

#include <cstdint>

#include "../../../kernels/cpu/fields.h"

namespace moehive {

struct PlainReply {
  uint64_t id, compute_ns, rows;
  const uint8_t* values;  // in the message
  uint64_t values_bytes;
  uint64_t began_ns, reading_ns, waited_ns, wrote_ns;

  // Whether the message is one; it begins with its id, as nodes write it.
  bool read(const uint8_t* message, int64_t size) {
    using namespace reply_field;
    *this = {};
    if (size < 1 || *message != number_tag(kId)) return false;
    const uint8_t *at = message, *const end = message + size;
    while (at < end) {
      uint64_t tag, value;
      if (!get_varint(at, end, tag) || !get_varint(at, end, value)) return false;
      switch (tag) {
        case number_tag(kId): id = value; break;
        case number_tag(kComputeNs): compute_ns = value; break;
        case number_tag(kRows): rows = value; break;
        case number_tag(kBeganNs): began_ns = value; break;
        case number_tag(kReadingNs): reading_ns = value; break;
        case number_tag(kWaitedNs): waited_ns = value; break;
        case number_tag(kWroteNs): wrote_ns = value; break;
        case bytes_tag(kValues):
          if (value > static_cast<uint64_t>(end - at)) return false;
          values = at, values_bytes = value, at += value;
          break;
        default: return false;
      }
    }
    return true;
  }
};

}  // namespace moehive

#endif
