// Times in nanoseconds of the clock that never jumps.
#ifndef MOEHIVE_COORDINATOR_BENCH_CLOCK_H_
#define MOEHIVE_COORDINATOR_BENCH_CLOCK_H_

#include <time.h>

#include <cstdint>

namespace moehive {

constexpr int64_t kSecond = 1'000'000'000;

inline int64_t nanoseconds(const timespec& time) { return time.tv_sec * kSecond + time.tv_nsec; }

inline int64_t now_on(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return nanoseconds(time);
}

inline int64_t now() { return now_on(CLOCK_MONOTONIC); }

}  // namespace moehive

#endif
