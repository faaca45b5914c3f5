// A node's answer to a plain request, from the bytes that came to the bytes that go: proto/experts.proto's
// ComputeRequest and ComputeReply, read and written here for the requests of decoding, of which there is one for each
// layer of each token. Whatever is not plain (rows in 8 bits, a chain, hints, nonsense) is left to Python.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <vector>

#include "expert_mlp.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

// Field for field as kernels/answer.py has them.
struct MoehiveTable {
  const MoehiveSpec* spec;  // that lays out all experts of the layer; null: it is not known
  const uint64_t* blobs;    // [count]: the address of each expert by its number, or 0
  int64_t count, work;      // multiply-adds of a pair
};

// proto/wire/windows.py's Times: when the message came, and when the reply before it went.
struct MoehiveTimes {
  int64_t read_at, came_at, ready_at, sent_at;
};

struct MoehiveAnswering {
  void* experts;
  const MoehiveTable* tables;  // [layers]
  int64_t layers;
  uint64_t first_epoch;                       // requests of older ones mean another model
  int64_t most_bytes, most_pairs, most_work;  // of a request
  uint8_t* reply;                             // `room` bytes, and before them what a message's head takes
  int64_t room;
  int64_t calls, pairs, nanoseconds;  // of all requests that were answered
};

namespace {

// Places are bytes from the start of the message.
struct MoehiveRequest {
  uint64_t id, epoch;
  uint32_t layer, tokens, hidden_size, dtype, reduction, pairs;
  uint32_t hidden_at, offsets_at, experts_at, weights_at;
};

using namespace moehive;

// As proto/tensors.py bounds them.
constexpr uint32_t kMaxTokens = 8192, kMaxHidden = 65536, kMaxLayer = 1023, kMaxExpert = 65535, kMaxPairs = 64;
// proto/experts.proto's numbers.
constexpr uint32_t kF32 = 1, kBf16 = 2, kPartialSum = 1, kPerExpert = 2;
enum Field : uint32_t {
  kId = 1, kEpoch, kStep, kLayer, kTokens, kHiddenSize, kDtype, kReduction, kHiddenStates, kOffsets, kExperts, kWeights
};
enum ReplyField : uint8_t {
  kReplyId = 1, kComputeNs, kRows, kValues, kBeganNs = 9, kReadingNs, kWaitedNs, kWroteNs
};

class Reader {
 public:
  Reader(const uint8_t* message, int64_t size) : start_(message), at_(message), end_(message + size) {}

  bool more() const { return at_ < end_; }

  bool varint(uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64 && at_ < end_; shift += 7) {
      const uint8_t byte = *at_++;
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  // A length-delimited field: where its content begins, and its bytes.
  bool content(uint32_t& place, uint32_t& length) {
    uint64_t bytes;
    if (!varint(bytes) || bytes > static_cast<uint64_t>(end_ - at_)) return false;
    place = static_cast<uint32_t>(at_ - start_);
    length = static_cast<uint32_t>(bytes);
    at_ += bytes;
    return true;
  }

 private:
  const uint8_t *start_, *at_, *end_;
};

template <class Number>
Number number_at(const uint8_t* message, uint32_t place, uint32_t index) {
  Number number;  // of any alignment
  std::memcpy(&number, message + place + index * sizeof number, sizeof number);
  return number;
}

uint8_t* put_varint(uint8_t* to, uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<uint8_t>(value) | 0x80;
  *to++ = static_cast<uint8_t>(value);
  return to;
}

uint8_t* put_number(uint8_t* to, uint8_t field, int64_t value) {
  *to++ = static_cast<uint8_t>(field << 3);
  return put_varint(to, static_cast<uint64_t>(value));
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

bool read(const uint8_t* message, int64_t size, MoehiveRequest& request) {
  Reader reader(message, size);
  request = {};
  uint64_t numbers[kReduction + 1] = {};
  uint32_t places[kWeights + 1] = {}, lengths[kWeights + 1] = {};
  while (reader.more()) {
    uint64_t tag;
    if (!reader.varint(tag)) return false;
    const uint64_t field = tag >> 3, kind = tag & 7;
    if (kind == 0 && field >= kId && field <= kReduction) {
      if (!reader.varint(numbers[field])) return false;
    } else if (kind == 2 && field >= kHiddenStates && field <= kWeights) {
      if (!reader.content(places[field], lengths[field])) return false;
    } else {
      return false;
    }
  }
  if (numbers[kLayer] > kMaxLayer || numbers[kTokens] < 1 || numbers[kTokens] > kMaxTokens ||
      numbers[kHiddenSize] < 1 || numbers[kHiddenSize] > kMaxHidden ||
      (numbers[kDtype] != kF32 && numbers[kDtype] != kBf16) ||
      (numbers[kReduction] != kPartialSum && numbers[kReduction] != kPerExpert))
    return false;
  request.id = numbers[kId];
  request.epoch = numbers[kEpoch];
  request.layer = static_cast<uint32_t>(numbers[kLayer]);
  request.tokens = static_cast<uint32_t>(numbers[kTokens]);
  request.hidden_size = static_cast<uint32_t>(numbers[kHiddenSize]);
  request.dtype = static_cast<uint32_t>(numbers[kDtype]);
  request.reduction = static_cast<uint32_t>(numbers[kReduction]);
  request.hidden_at = places[kHiddenStates];
  request.offsets_at = places[kOffsets];
  request.experts_at = places[kExperts];
  request.weights_at = places[kWeights];
  const uint64_t width = request.dtype == kF32 ? 4 : 2;
  if (lengths[kHiddenStates] != request.tokens * uint64_t{request.hidden_size} * width ||
      lengths[kOffsets] != 4 * (request.tokens + 1))
    return false;
  uint32_t before = 0;
  for (uint32_t t = 0; t <= request.tokens; ++t) {
    const uint32_t offset = number_at<uint32_t>(message, request.offsets_at, t);
    if (offset < before || (t == 0 && offset != 0)) return false;
    before = offset;
  }
  request.pairs = before;
  if (before > kMaxPairs * request.tokens || lengths[kExperts] != 4 * uint64_t{before} ||
      lengths[kWeights] != 4 * uint64_t{before})
    return false;
  for (uint32_t pair = 0; pair < before; ++pair) {
    if (number_at<uint32_t>(message, request.experts_at, pair) > kMaxExpert ||
        !std::isfinite(number_at<float>(message, request.weights_at, pair)))
      return false;
  }
  return true;
}

template <class Number>
std::vector<Number> numbers_at(const uint8_t* message, uint32_t place, uint32_t count) {
  std::vector<Number> numbers(count);
  if (count) std::memcpy(numbers.data(), message + place, count * sizeof(Number));
  return numbers;
}

}  // namespace

// Computes a request that was read out of `message`, and writes its reply's bytes. Returns how many were written, or 0
// when an expert is not there, the request does not fit, or there is no memory: then somebody else says what is wrong.
static int64_t compute(const MoehiveAnswering& answering, const MoehiveTable& table, const uint8_t* message,
                       const MoehiveRequest& r, MoehiveTimes* times, int64_t* nanoseconds) {
  const int64_t start = now();
  const bool bf16 = r.dtype == kBf16, added = r.reduction == kPartialSum;
  const uint64_t rows = added ? r.tokens : r.pairs, width = bf16 ? 2 : 4;
  const uint64_t bytes = rows * r.hidden_size * width;
  constexpr int64_t kHead = 128;  // more than the fields before the rows take
  if (table.spec->hidden_size != r.hidden_size || static_cast<uint64_t>(answering.room) < bytes + kHead) return 0;
  try {
    const auto offsets = numbers_at<uint32_t>(message, r.offsets_at, r.tokens + 1);
    const auto weights = numbers_at<float>(message, r.weights_at, r.pairs);
    std::vector<uint64_t> addresses(r.pairs);
    for (uint32_t pair = 0; pair < r.pairs; ++pair) {
      const uint32_t expert = number_at<uint32_t>(message, r.experts_at, pair);
      if (expert >= table.count || table.blobs[expert] == 0) return 0;
      addresses[pair] = table.blobs[expert];
    }
    // Aligned, both: the message's rows are not.
    std::vector<uint64_t> hidden((r.tokens * uint64_t{r.hidden_size} * width + 7) / 8), out((bytes + 7) / 8);
    std::memcpy(hidden.data(), message + r.hidden_at, r.tokens * uint64_t{r.hidden_size} * width);
    static_cast<Experts*>(answering.experts)->run(
        {*table.spec, r.tokens, offsets.data(), addresses.data(), weights.data()},
        {hidden.data(), bf16}, {out.data(), bf16}, added);
    const int64_t end = now();
    *nanoseconds = end - start;
    if (times->came_at == 0) times->came_at = start;  // the first of what one reading brought waits for nobody
    uint8_t* at = answering.reply;
    at = put_number(at, kReplyId, r.id);
    at = put_number(at, kComputeNs, *nanoseconds);
    at = put_number(at, kRows, rows);
    at = put_number(at, kBeganNs, start);
    at = put_number(at, kReadingNs, times->came_at - times->read_at);
    at = put_number(at, kWaitedNs, start - times->came_at);
    at = put_number(at, kWroteNs, times->ready_at ? std::max<int64_t>(0, times->sent_at - times->ready_at) : 0);
    times->ready_at = end;
    *at++ = kValues << 3 | 2;
    at = put_varint(at, bytes);
    if (bytes) std::memcpy(at, out.data(), bytes);
    return at + bytes - answering.reply;
  } catch (const std::exception&) {
    return 0;
  }
}

// Answers a message if it is a plain and sound request within the limits: whether it was. The reply's bytes are at
// `*reply`, until the next one's.
MOEHIVE_API int32_t moehive_answer(MoehiveAnswering* answering, const uint8_t* message, int64_t size,
                                   MoehiveTimes* times, uint8_t** reply, int64_t* reply_size) {
  MoehiveRequest request;
  if (size > answering->most_bytes || !read(message, size, request)) return 0;
  if (request.layer >= answering->layers || request.epoch < answering->first_epoch) return 0;
  const MoehiveTable& table = answering->tables[request.layer];
  if (!table.spec || request.pairs > answering->most_pairs || request.pairs * table.work > answering->most_work)
    return 0;
  int64_t nanoseconds = 0;
  const int64_t written = compute(*answering, table, message, request, times, &nanoseconds);
  if (written == 0) return 0;
  ++answering->calls;
  answering->pairs += request.pairs;
  answering->nanoseconds += nanoseconds;
  *reply = answering->reply;
  *reply_size = written;
  return 1;
}
