// epoll that ends its wait in time.
#ifndef MOEHIVE_COORDINATOR_BENCH_POLL_H_
#define MOEHIVE_COORDINATOR_BENCH_POLL_H_

#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "clock.h"

#ifndef SYS_epoll_pwait2  // headers before Linux 5.11; the number is the same on every architecture
#define SYS_epoll_pwait2 441
#endif

namespace moehive {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

class Poll {
 public:
  Poll() : epoll_(epoll_create1(EPOLL_CLOEXEC)) {}
  ~Poll() {
    if (epoll_ >= 0) close(epoll_);
  }
  Poll(const Poll&) = delete;
  Poll& operator=(const Poll&) = delete;

  // EPOLL_CTL_ADD, _MOD or _DEL. False: errno says why not.
  bool control(int what, int descriptor, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.fd = descriptor;
    return epoll_ctl(epoll_, what, descriptor, &event) == 0;
  }

  // As epoll_wait, but until `due`. It may come back a little before with no event: who then calls again does not
  // sleep. A sleeping processor is woken some 20 µs late, so the wait ends earlier by what nearly every one was late.
  int wait(epoll_event* events, int room, int64_t due) {
    if (due == kNever) return epoll_wait(epoll_, events, room, -1);
    const int64_t end = due - early_, left = std::max<int64_t>(end - now(), 0);
    const int64_t timeout[] = {left / kSecond, left % kSecond};  // the kernel's timespec
    // Not by glibc, which knows this call from 2.35 only.
    const long count = syscall(SYS_epoll_pwait2, epoll_, events, room, timeout, nullptr, size_t{0});
    if (count == 0 && left > kMostEarly) {
      // Comes to rest where nine in ten are later.
      early_ = std::clamp<int64_t>(early_ + (now() - end > early_ ? kStep : -9 * kStep), 0, kMostEarly);
    }
    return static_cast<int>(count);
  }

 private:
  static constexpr int64_t kMostEarly = 50'000, kStep = 50;  // ns

  const int epoll_;
  int64_t early_ = 0;  // ns
};

}  // namespace moehive

#endif
