// Bytes from a TCP socket, and when the kernel got them: a reader that had to wait for a processor knows better than by
// its own clock.
#ifndef MOEHIVE_COORDINATOR_BENCH_RECEIVE_H_
#define MOEHIVE_COORDINATOR_BENCH_RECEIVE_H_

#include <sys/socket.h>
#include <sys/uio.h>

#include <cstdint>
#include <cstring>

#include "clock.h"

namespace moehive {

// Has the kernel note when bytes come.
inline void note_arrivals(int socket) {
  const int on = 1;
  setsockopt(socket, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
}

// As recv. `came`: when the last of the bytes did, where the kernel has noted that; else it stays as it is.
inline int64_t receive(int socket, uint8_t* to, int64_t room, int64_t* came) {
  iovec part{to, static_cast<size_t>(room)};
  alignas(cmsghdr) char notes[CMSG_SPACE(sizeof(timespec))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = notes;
  message.msg_controllen = sizeof notes;
  const int64_t count = recvmsg(socket, &message, 0);
  if (count <= 0) return count;
  const cmsghdr* note = CMSG_FIRSTHDR(&message);
  if (note && note->cmsg_level == SOL_SOCKET && note->cmsg_type == SCM_TIMESTAMPNS) {
    timespec time;  // of day
    std::memcpy(&time, CMSG_DATA(note), sizeof time);
    *came = now() - (now_on(CLOCK_REALTIME) - nanoseconds(time));
  }
  return count;
}

}  // namespace moehive

#endif
