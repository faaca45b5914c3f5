// Bytes in the order in which they came, in memory that stays.
#ifndef MOEHIVE_COORDINATOR_BENCH_BYTE_RING_H_
#define MOEHIVE_COORDINATOR_BENCH_BYTE_RING_H_

#include <algorithm>
#include <cstdint>
#include <memory>

namespace moehive {

class ByteRing {
 public:
  static constexpr int64_t kBytes = 4 << 20;

  // Some of the ring's memory that lies in one piece.
  struct Span {
    uint8_t* at;
    int64_t bytes;
  };

  int64_t room() const { return kBytes - (end_ - start_); }

  // Where the next bytes go, at most `most`; `put` says how many came.
  Span free(int64_t most) {
    if (start_ == end_) start_ = end_ = 0;  // while little is on its way, in the same few lines of the caches
    const int64_t at = end_ % kBytes;
    return {&bytes_[at], std::min({most, room(), kBytes - at})};
  }
  void put(int64_t count) { end_ += count; }

  // The first of the bytes, at most `most`; `take` says how many are not needed any more.
  Span first(int64_t most) {
    const int64_t at = start_ % kBytes;
    return {&bytes_[at], std::min({most, end_ - start_, kBytes - at})};
  }
  void take(int64_t count) { start_ += count; }

 private:
  // Not cleared: the system gives a page when bytes first come that far.
  const std::unique_ptr<uint8_t[]> bytes_{new uint8_t[kBytes]};
  int64_t start_ = 0, end_ = 0;  // of what is held, counted from a time when nothing was
};

}  // namespace moehive

#endif
