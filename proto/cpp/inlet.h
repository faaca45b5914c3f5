// Messages of a stream that are waited for in native code: how they are read where everything comes as usual, and how to
// wait until something comes. Python's event loop has a turn for whatever else there is (proto/wire/serving.py).
#ifndef MOEHIVE_PROTO_INLET_H_
#define MOEHIVE_PROTO_INLET_H_

#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdint>

namespace moehive {

constexpr int64_t kNothing = -1;  // has come: socket.h's kWouldBlock
constexpr int kPatienceMs = 2;    // for a message, asleep: the loop's timers are as late

// proto/wire/windows.py has what follows, field for field. When a stream's latest message came and its latest reply
// went, nanoseconds of this process's monotonic clock; 0: not yet.
struct Times {
  int64_t read_at;   // the reading of its bytes began
  int64_t came_at;   // it was there; who takes the first of what one reading brought says so
  int64_t ready_at;  // the latest reply's content was there; who takes says so
  int64_t sent_at;   // a reply's bytes had left
};

// What a reading found.
struct Served {
  int64_t filled, consumed;  // bytes in the buffer, and those of them that are done with
  int64_t taken, messages;   // bytes of data of the messages that were taken, and those
  int64_t unsent;            // bytes of the last reply's frame that did not leave, see `unsent_at`
  const uint8_t* unsent_at;
  int64_t kept;              // whether the buffer begins with a message that is not whole yet
  int64_t refused;           // the last reply, without its head, is at `unsent_at`: the windows do not let it through

  // Whether all that came were messages that were taken, and all replies have left.
  bool all() const { return messages && consumed == filled && !kept && !unsent; }
};

// What the event loop waits with (proto/lookout.py).
struct Eyes {
  int32_t (*look)(int32_t descriptor, int32_t load, int64_t processors, int64_t nanoseconds);  // see lookout.cc
  int32_t descriptor, load;
  int64_t processors;

  // Whether the loop has something to do, a message or something else: looks for so many nanoseconds, then sleeps.
  bool wait(int64_t nanoseconds) const {
    if (nanoseconds > 0 && look(descriptor, load, processors, nanoseconds) && ready(0)) return true;
    return ready(kPatienceMs);
  }

 private:
  bool ready(int milliseconds) const {
    pollfd loop{descriptor, POLLIN, 0};
    return poll(&loop, 1, milliseconds) > 0;
  }
};

// A stream whose messages somebody reads who waits for them.
struct Inlet {
  int64_t (*serve)(void* sending, void* windows, Times* times, void* take, void* taker, void* buffer, int64_t room,
                   int64_t filled, Served* served);  // moehive_serve
  void *sending, *windows;
  Times* times;
  void *take, *taker, *buffer;
  Served* served;
  int64_t room, descriptor, taken, got, usual;

  // Has the messages taken that have come; kNothing, or whether that was all that came. What else there was, an end
  // among it, is the connection's from then on.
  int64_t read() {
    const int64_t came = serve(sending, windows, times, take, taker, buffer, room, 0, served);
    if (came == kNothing) return kNothing;
    if (came > 0 && served->all()) {
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

inline int this_processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -2;
#endif
}

}  // namespace moehive

#endif
