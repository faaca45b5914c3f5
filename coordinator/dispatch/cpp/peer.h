// A node as dispatch asks it: link.py has these structures, field for field.
#ifndef MOEHIVE_DISPATCH_PEER_H_
#define MOEHIVE_DISPATCH_PEER_H_

#include <cstdint>

#include "../../../proto/cpp/inlet.h"
#include "speeds.h"

namespace moehive {

constexpr int32_t kMaxInFlight = 64;  // MAX_IN_FLIGHT
constexpr int64_t kNotSent = -1;      // as proto/cpp/socket.h's kWouldBlock

// How messages leave on a node's stream: proto/cpp/messages.cc's moehive_send.
struct Outlet {
  int64_t (*send)(void* sending, void* windows, uint8_t* message, int64_t size);  // null: Python sends
  void *sending, *windows;
};

struct Peer {
  LinkSpeed* link;  // null: this process's own memory
  NodeSpeed* speed;
  NodeCounters* counters;
  uint64_t next_id;
  int32_t others;  // requests on the link that are no flight's
  int32_t flying;  // those that are
  Outlet outlet;
  Inlet* inlet;   // null: only the event loop reads what it sends
  int64_t waits;  // whether it begins only when this thread leaves its processor, see Flight::look_around
};

class Flights;

// Who takes a node's replies as they are read.
struct Landing {
  Flights* flights;
  const Peer* peer;
};

}  // namespace moehive

#endif
