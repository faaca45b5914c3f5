// What Python sees of a layer on its way: flight.py has these structures, field for field.
#ifndef MOEHIVE_DISPATCH_VIEW_H_
#define MOEHIVE_DISPATCH_VIEW_H_

#include <cstdint>

namespace moehive {

constexpr int64_t kMaxShares = 64;

enum State : int64_t { kAsked, kHere, kTaken, kFailed };  // of a share; kHere: this process is to compute it

// When a share was asked for and answered, nanoseconds: the first three of this process's monotonic clock, `began` of
// the node's; the others are what the node says it took (proto/experts.proto).
struct Trip {
  int64_t sent, read, came;
  int64_t began, reading, waited, computed, wrote;
};

struct View {
  int64_t shares, waiting;  // and those of them that are not over
  int64_t here;             // the share of this process's own experts, or -1
  int64_t unknown;          // whether nobody knows how long some node takes
  int64_t unsent;           // messages that did not leave whole
  int64_t owed;             // the most bytes that one of its nodes' inlets has read, and nobody has counted
  double expected_s;        // until the last answer, by what is known
  const int64_t* block;     // see moehive_split
  int64_t state[kMaxShares], node[kMaxShares];
  int64_t message[kMaxShares], size[kMaxShares];  // a message's address and bytes, behind room for its head
  int64_t sent[kMaxShares];                       // what the outlet said, or kNotSent
  Trip trip[kMaxShares];                          // of a share that is taken, if a node was asked
};

}  // namespace moehive

#endif
