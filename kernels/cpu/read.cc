// How fast this machine's memory can be read: what every kernel that streams weights is measured against.
#include <atomic>
#include <cstring>
#include <exception>

#include "pool.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kPiece = 1 << 20;  // bytes that one thread reads before it takes the next
constexpr int64_t kLine = 128;       // of each stream in turn

// Streams read parts of a piece in turns, eight words of 16 bytes of each: on every processor the loads are quicker
// than the memory.
uint64_t read_piece(const char* at, int64_t bytes, int64_t streams) {
  typedef uint64_t Word __attribute__((vector_size(16)));
  Word sums[8] = {};
  const int64_t part = bytes / streams / kLine * kLine;
  for (int64_t i = 0; i < part; i += kLine) {
    for (int64_t stream = 0; stream < streams; ++stream) {
      for (int k = 0; k < 8; ++k) {
        Word word;
        std::memcpy(&word, at + stream * part + i + 16 * k, sizeof word);
        sums[k] ^= word;
      }
    }
  }
  uint64_t all = 0;
  for (const Word& sum : sums) all ^= sum[0] ^ sum[1];
  for (int64_t i = part * streams; i < bytes; ++i) all ^= static_cast<unsigned char>(at[i]);
  return all;
}

}  // namespace

// Reads `bytes` bytes once with `threads` threads, each in `streams` streams at once. Returns 0; 1 if an argument can't
// be; 2 without memory or threads.
// `sum` gets the exclusive or of all, so that no compiler leaves the reading out.
MOEHIVE_API int32_t moehive_read(const void* memory, int64_t bytes, int32_t threads, int32_t streams, uint64_t* sum) {
  if (!memory || bytes < 0 || threads < 1 || streams < 1 || !sum) return 1;
  try {
    moehive::Pool pool(threads);
    std::atomic<uint64_t> all{0};
    pool.run((bytes + kPiece - 1) / kPiece, [&](uint32_t item) {
      const int64_t first = item * kPiece;
      all ^= read_piece(static_cast<const char*>(memory) + first, bytes - first < kPiece ? bytes - first : kPiece, streams);
    });
    *sum = all;
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}
