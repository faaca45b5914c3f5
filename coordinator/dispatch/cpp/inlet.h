// Replies that are waited for in native code: how a node's stream is read where everything comes as usual, and how to
// wait until something comes. The event loop has a turn for whatever else there is (dispatch/flights.py).
#ifndef MOEHIVE_DISPATCH_INLET_H_
#define MOEHIVE_DISPATCH_INLET_H_

#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdint>

namespace moehive {

constexpr int64_t kNothing = -1;  // has come: proto/cpp/socket.h's kWouldBlock
constexpr int kPatienceMs = 2;    // for an answer, asleep: the loop's timers are as late

// proto/cpp/messages.cc's Served.
struct Served {
  int64_t filled, consumed, taken, messages, unsent;
  const uint8_t* unsent_at;
  int64_t kept, refused;
};

// proto/wire/windows.py has it, field for field, and says what it means.
struct Inlet {
  int64_t (*serve)(void* sending, void* windows, void* times, void* take, void* taker, void* buffer, int64_t room,
                   int64_t filled, Served* served);
  void *sending, *windows, *times, *take, *taker, *buffer;
  Served* served;
  int64_t room, descriptor, taken, got, usual;

  // Has the replies taken that have come; kNothing, or whether that was all that came. What else there was, an end
  // among it, is the connection's from then on.
  int64_t read() {
    const int64_t came = serve(sending, windows, times, take, taker, buffer, room, 0, served);
    if (came == kNothing) return kNothing;
    if (came > 0 && served->consumed == served->filled && !served->unsent && !served->kept) {
      taken += served->taken;
      return 1;
    }
    usual = 0, got = std::max<int64_t>(came, 0);
    return 0;
  }

  // The processor that sent the latest bytes, on loopback, where the system hands them over there; -1: not known.
  int sender() const {
    int processor = -1;
#ifdef SO_INCOMING_CPU
    socklen_t size = sizeof processor;
    if (getsockopt(static_cast<int>(descriptor), SOL_SOCKET, SO_INCOMING_CPU, &processor, &size)) return -1;
#endif
    return processor;
  }
};

// proto/lookout.py has it, field for field.
struct Eyes {
  int32_t (*look)(int32_t descriptor, int32_t load, int64_t processors, int64_t nanoseconds);
  int32_t descriptor, load;
  int64_t processors;

  // Whether the loop has something to do, a message or something else, after so many nanoseconds of looking.
  bool look_for(int64_t nanoseconds) const {
    return nanoseconds > 0 && look(descriptor, load, processors, nanoseconds) && ready(0);
  }

  // The same, asleep.
  bool ready(int milliseconds) const {
    pollfd loop{descriptor, POLLIN, 0};
    return poll(&loop, 1, milliseconds) > 0;
  }
};

inline int this_processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -2;
#endif
}

}  // namespace moehive

#endif
