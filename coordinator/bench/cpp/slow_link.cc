// The made-up network of ../slow_link.py, whose process calls this once and stays in here.
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <new>

#include "network.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A network does not wait for a processor behind the programs that it serves. With much weight, which takes a
// permission, and short turns, which Linux grants from 6.12 on, the thread has its turn soon after it wakes. Real-time
// priority would keep it on its processor though another is idle, which takes longer when nobody else wants one.
void go_first() {
  struct {  // the kernel's sched_attr, for which glibc has no name yet
    uint32_t size = 48, policy = SCHED_OTHER;
    uint64_t flags = 0;
    int32_t nice;
    uint32_t priority = 0;
    uint64_t runtime = 100'000, deadline = 0, period = 0;  // ns; the first is the turn
  } wish;
  setpriority(PRIO_PROCESS, 0, -20);
  wish.nice = getpriority(PRIO_PROCESS, 0);
  syscall(SYS_sched_setattr, 0, &wish, 0);
  prctl(PR_SET_TIMERSLACK, 1ul);  // ns: how late the kernel may wake us; 50 µs unless told
}

}  // namespace

EXPORT int32_t moehive_slow_link_abi() { return 1; }

// Carries the cables until `stop` can be read or has ended: 0, else an errno. Sockets stay the caller's.
EXPORT int32_t moehive_slow_link_run(const moehive::Cable* cables, int64_t count, int64_t hosts, int64_t delay_ns,
                                     double ns_per_byte, int32_t stop) {
  try {
    go_first();
    return moehive::Network(cables, count, hosts, delay_ns, ns_per_byte).run(stop);
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
}
