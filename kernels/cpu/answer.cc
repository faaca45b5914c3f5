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
#include "fields.h"

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

using namespace moehive;

// As proto/tensors.py bounds them.
constexpr uint32_t kMaxTokens = 8192, kMaxHidden = 65536, kMaxLayer = 1023, kMaxExpert = 65535, kMaxPairs = 64;

// A message's fields by their numbers. Places are bytes from its start.
struct Fields {
  uint64_t numbers[request_field::kReduction + 1];
  uint32_t places[request_field::kWeights + 1], lengths[request_field::kWeights + 1];
};

struct Request {
  uint64_t id, epoch;
  uint32_t layer, tokens, hidden_size, dtype, reduction, pairs;
  uint32_t hidden_at, offsets_at, experts_at, weights_at;
};

template <class Number>
Number number_at(const uint8_t* message, uint32_t place, uint32_t index) {
  Number number;  // of any alignment
  std::memcpy(&number, message + place + index * sizeof number, sizeof number);
  return number;
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Whether there are plain fields alone.
bool parse(const uint8_t* message, int64_t size, Fields& fields) {
  using namespace request_field;
  fields = {};
  const uint8_t *at = message, *const end = message + size;
  while (at < end) {
    uint64_t tag, value;
    if (!get_varint(at, end, tag) || !get_varint(at, end, value)) return false;
    const uint64_t field = tag >> 3, kind = tag & 7;
    if (kind == 0 && field >= kId && field <= kReduction) {
      fields.numbers[field] = value;
    } else if (kind == 2 && field >= kHiddenStates && field <= kWeights) {
      if (value > static_cast<uint64_t>(end - at)) return false;
      fields.places[field] = static_cast<uint32_t>(at - message);
      fields.lengths[field] = static_cast<uint32_t>(value);
      at += value;
    } else {
      return false;
    }
  }
  return true;
}

// Whether all numbers are within their bounds, and the arrays of tokens as long as those say.
bool bounded(const Fields& fields) {
  using namespace request_field;
  const uint64_t* const n = fields.numbers;
  if (n[kLayer] > kMaxLayer || n[kTokens] < 1 || n[kTokens] > kMaxTokens || n[kHiddenSize] < 1 ||
      n[kHiddenSize] > kMaxHidden || (n[kDtype] != kF32 && n[kDtype] != kBf16) ||
      (n[kReduction] != kPartialSum && n[kReduction] != kPerExpert))
    return false;
  const uint64_t width = n[kDtype] == kF32 ? 4 : 2;
  return fields.lengths[kHiddenStates] == n[kTokens] * n[kHiddenSize] * width &&
         fields.lengths[kOffsets] == 4 * (n[kTokens] + 1);
}

// Whether the pairs are sound, and as many as their arrays have bytes for; then their number stands in `request`.
bool read_pairs(const uint8_t* message, uint32_t experts_bytes, uint32_t weights_bytes, Request& request) {
  uint32_t before = 0;
  for (uint32_t t = 0; t <= request.tokens; ++t) {
    const uint32_t offset = number_at<uint32_t>(message, request.offsets_at, t);
    if (offset < before || (t == 0 && offset != 0)) return false;
    before = offset;
  }
  request.pairs = before;
  const uint64_t bytes = 4 * uint64_t{before};
  if (before > kMaxPairs * request.tokens || experts_bytes != bytes || weights_bytes != bytes) return false;
  for (uint32_t pair = 0; pair < before; ++pair) {
    if (number_at<uint32_t>(message, request.experts_at, pair) > kMaxExpert ||
        !std::isfinite(number_at<float>(message, request.weights_at, pair)))
      return false;
  }
  return true;
}

bool read(const uint8_t* message, int64_t size, Request& request) {
  using namespace request_field;
  Fields fields;
  if (!parse(message, size, fields) || !bounded(fields)) return false;
  const auto number = [&](int field) { return static_cast<uint32_t>(fields.numbers[field]); };
  request.id = fields.numbers[kId], request.epoch = fields.numbers[kEpoch];
  request.layer = number(kLayer), request.tokens = number(kTokens), request.hidden_size = number(kHiddenSize);
  request.dtype = number(kDtype), request.reduction = number(kReduction);
  request.hidden_at = fields.places[kHiddenStates], request.offsets_at = fields.places[kOffsets];
  request.experts_at = fields.places[kExperts], request.weights_at = fields.places[kWeights];
  return read_pairs(message, fields.lengths[kExperts], fields.lengths[kWeights], request);
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
                       const Request& r, MoehiveTimes* times, int64_t* nanoseconds) {
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
    using namespace reply_field;
    uint8_t* at = answering.reply;
    at = put_number(at, kId, r.id);
    at = put_number(at, kComputeNs, *nanoseconds);
    at = put_number(at, kRows, rows);
    at = put_number(at, kBeganNs, start);
    at = put_number(at, kReadingNs, times->came_at - times->read_at);
    at = put_number(at, kWaitedNs, start - times->came_at);
    at = put_number(at, kWroteNs, times->ready_at ? std::max<int64_t>(0, times->sent_at - times->ready_at) : 0);
    times->ready_at = end;
    return put_bytes(at, kValues, out.data(), bytes) - answering.reply;
  } catch (const std::exception&) {
    return 0;
  }
}

// Answers a message if it is a plain and sound request within the limits: whether it was. The reply's bytes are at
// `*reply`, until the next one's.
MOEHIVE_API int32_t moehive_answer(MoehiveAnswering* answering, const uint8_t* message, int64_t size,
                                   MoehiveTimes* times, uint8_t** reply, int64_t* reply_size) {
  Request request;
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
