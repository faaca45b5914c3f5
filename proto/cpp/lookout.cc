// Looks whether something has come, without sleeping: proto/lookout.py calls this.
#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLooks = 8;  // between two questions who else wants the processor: some 8 µs

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of the machine that run or want to, this one among them, as /proc/loadavg says: 0.20 0.18 0.12 1/80 11206.
// Of what does not look like that: more than any machine has processors.
int64_t running(int load) {
  constexpr int64_t kMany = INT32_MAX;
  char text[128];
  const ssize_t size = pread(load, text, sizeof text, 0);
  const void* const slash = size > 0 ? std::memchr(text, '/', size) : nullptr;
  if (slash == nullptr) return kMany;
  const char* const end = static_cast<const char*>(slash);
  int64_t number = 0, unit = 1;
  const char* at = end;
  for (; at > text && at[-1] >= '0' && at[-1] <= '9' && unit < kMany; --at, unit *= 10) number += (at[-1] - '0') * unit;
  return at == end ? kMany : number;
}

}  // namespace

// Returns 1 once `descriptor` can be read, or can't be used any more, or so many nanoseconds have passed, and 0 at once
// when by /proc/loadavg, opened as `load`, threads run on all `processors`: a look must not slow a neighbour's core down.
extern "C" __attribute__((visibility("default"))) int32_t moehive_look(int32_t descriptor, int32_t load,
                                                                     int64_t processors, int64_t nanoseconds) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(nanoseconds);
  pollfd one{descriptor, POLLIN, 0};
  for (;;) {
    if (running(load) >= processors) return 0;
    for (int look = 0; look < kLooks; ++look) {
      if (poll(&one, 1, 0) != 0) return 1;
      for (int i = 0; i < 8; ++i) relax();
    }
    if (Clock::now() >= end) return 1;
    sched_yield();  // whoever waits for this processor has it at once, and is counted next
  }
}
