// Looks whether something has come, without sleeping: proto/lookout.py calls this.
#include <poll.h>

#include <chrono>
#include <cstdint>

namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Returns once `descriptor` can be read, or can't be used any more, or so many nanoseconds have passed.
extern "C" __attribute__((visibility("default"))) void moehive_look(int32_t descriptor, int64_t nanoseconds) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + std::chrono::nanoseconds(nanoseconds);
  pollfd one{descriptor, POLLIN, 0};
  while (::poll(&one, 1, 0) == 0 && Clock::now() < end)
    for (int i = 0; i < 8; ++i) pause();
}
